/*
 * Where the payload begins, whichever way it is loaded: PVH (32 bits, start information in ebx) or the
 * 64-bit entry of Linux (boot parameters in rsi). Both go on in long mode with the first 4 GiB mapped
 * as they are, by pages of 2 MiB, and call payload(information, is_pvh).
 *
 * Page tables: PML4 at 0x300000, PDPT at 0x301000, four page directories from 0x302000 on.
 */
#define PML4 0x300000
#define PDPT 0x301000
#define DIRECTORIES 0x302000
#define TABLES_LEN 0x6000
#define PRESENT_WRITABLE 3
#define PRESENT_WRITABLE_LARGE 0x83
#define LARGE_PAGE 0x200000

        .section .note.pvh, "a", @note
        .long 4, 4, 18                  /* XEN_ELFNOTE_PHYS32_ENTRY */
        .asciz "Xen"
        .long start_pvh

/* The same instructions for both modes; `di` is edi or rdi. */
        .macro make_tables di
        movl $PML4, %edi
        movl $(TABLES_LEN / 4), %ecx
        xorl %eax, %eax
        cld
        rep stosl
        movl $(PDPT + PRESENT_WRITABLE), PML4
        movl $(DIRECTORIES + PRESENT_WRITABLE), PDPT
        movl $(DIRECTORIES + 0x1000 + PRESENT_WRITABLE), PDPT + 8
        movl $(DIRECTORIES + 0x2000 + PRESENT_WRITABLE), PDPT + 16
        movl $(DIRECTORIES + 0x3000 + PRESENT_WRITABLE), PDPT + 24
        movl $DIRECTORIES, %edi
        movl $2048, %ecx
        movl $PRESENT_WRITABLE_LARGE, %eax
1:      movl %eax, (\di)
        addl $8, %edi
        addl $LARGE_PAGE, %eax
        decl %ecx
        jnz 1b
        .endm

        .text
        .code32
        .globl start_pvh
start_pvh:
        cli
        movl %ebx, %esi
        make_tables %edi
        lgdt gdt_pointer
        movl %cr4, %eax
        orl $0x20, %eax                 /* PAE */
        movl %eax, %cr4
        movl $PML4, %eax
        movl %eax, %cr3
        movl $0xc0000080, %ecx          /* EFER */
        rdmsr
        orl $0x100, %eax                /* LME */
        wrmsr
        movl %cr0, %eax
        orl $0x80000001, %eax           /* PG, PE */
        movl %eax, %cr0
        ljmp $8, $long_mode

        .code64
long_mode:
        movw $16, %ax
        movw %ax, %ds
        movw %ax, %es
        movw %ax, %ss
        movl %esi, %edi
        movl $1, %esi
        jmp run

        .globl start64
start64:
        cli
        movq %rsi, %rbx
        make_tables %rdi
        movl $PML4, %eax
        movq %rax, %cr3
        movq %rbx, %rdi
        xorl %esi, %esi
run:
        movq $stack_top, %rsp
        call payload
1:      hlt
        jmp 1b

        .balign 8
gdt:
        .quad 0
        .quad 0x00af9b000000ffff        /* code, 64 bits */
        .quad 0x00cf93000000ffff        /* data */
gdt_pointer:
        .word 23
        .long gdt

        .bss
        .balign 16
        .skip 16384
stack_top:
        .section .note.GNU-stack, "", @progbits
