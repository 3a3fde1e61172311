use std::sync::atomic::Ordering;

use vm_memory::Bytes;

use super::*;

/// Two regions side by side and one apart.
fn three() -> Memory {
    Memory::anonymous(&[(0x1000, 0x1000), (0x2000, 0x800), (0x10_0000, 0x1000)])
}

fn pieces(memory: &Memory, address: u64, len: u64) -> Result<Vec<usize>, OutsideMemory> {
    let mut pieces = Vec::new();
    memory.host_ranges(GuestAddress(address), len, &mut |_, len| pieces.push(len))?;
    Ok(pieces)
}

#[test]
fn the_vm_memory_crate_sees_the_same_memory() {
    let memory = three();
    let bytes: Vec<u8> = (0..100).collect();
    memory.write(GuestAddress(0x1fce), &bytes).unwrap();
    let mut found = [0; 100];
    memory.read_slice(&mut found, GuestAddress(0x1fce)).unwrap();
    assert_eq!(found[..], bytes);
    let word: u16 = memory.load(GuestAddress(0x1fd0), Ordering::Acquire).unwrap();
    assert_eq!(word.to_ne_bytes(), [2, 3]);
    for (address, len) in [(0x1000, 0x1800), (0x1000, 0x1801), (0xfff, 2), (u64::MAX - 1, 2)] {
        let inside = memory.check_range(GuestAddress(address), len, Permissions::Read);
        assert_eq!(inside, pieces(&memory, address, len as u64).is_ok(), "{address:#x}");
        let mut bytes = vec![0; len];
        assert_eq!(memory.read_slice(&mut bytes, GuestAddress(address)).is_ok(), inside);
    }
}

#[test]
fn ranges_split_at_the_borders_of_regions() {
    let memory = three();
    assert_eq!(pieces(&memory, 0x1000, 0x1800), Ok(vec![0x1000, 0x800]));
    assert_eq!(pieces(&memory, 0x1fff, 2), Ok(vec![1, 1]));
    assert_eq!(pieces(&memory, 0x27ff, 1), Ok(vec![1]));
    assert_eq!(pieces(&memory, 0x10_0000, 0x1000), Ok(vec![0x1000]));
    for nowhere in [0, 0x5000, u64::MAX] {
        assert_eq!(pieces(&memory, nowhere, 0), Ok(vec![]));
    }
    for (address, len) in [
        (0x27ff, 2),
        (0x2800, 1),
        (0, 1),
        (0xfff, 1),
        (0xfff, 2),
        (0x1000, 0x1801),
        (0x10_0fff, u64::MAX),
        (u64::MAX, 1),
        (u64::MAX, u64::MAX),
    ] {
        assert_eq!(pieces(&memory, address, len), Err(OutsideMemory { address, len }));
        assert_eq!(memory.contiguous(GuestAddress(address), len), None);
    }
    assert!(memory.contiguous(GuestAddress(0x1000), 0x1000).is_some());
    assert_eq!(memory.contiguous(GuestAddress(0x1000), 0x1001), None);
}

#[test]
fn copies_go_over_borders_and_are_all_or_nothing() {
    let memory = three();
    let bytes: Vec<u8> = (1..=40).collect();
    let mut got = vec![0; 40];
    for address in [0x1000, 0x1fed, 0x2800 - 40] {
        memory.write(GuestAddress(address), &bytes).unwrap();
        memory.read(GuestAddress(address), &mut got).unwrap();
        assert_eq!(got, bytes);
    }
    memory.write(GuestAddress(0x2800 - 8), &[0; 8]).unwrap();
    let outside = OutsideMemory { address: 0x2800 - 8, len: 9 };
    assert_eq!(memory.write(GuestAddress(0x2800 - 8), &[7; 9]), Err(outside.into()));
    let mut tail = [1; 8];
    memory.read(GuestAddress(0x2800 - 8), &mut tail).unwrap();
    assert_eq!(tail, [0; 8], "nothing was written");
}

#[test]
fn host_memory_is_written_only_inside_this_snapshot() {
    let (memory, other) = (three(), three());
    let host = memory.contiguous_mut(GuestAddress(0x2000), 0x800).unwrap();
    assert!(memory.write_host(host.wrapping_add(0x7fc), b"last"));
    let mut got = [0; 4];
    memory.read(GuestAddress(0x27fc), &mut got).unwrap();
    assert_eq!(&got, b"last");
    assert!(!memory.write_host(host.wrapping_add(0x7fd), b"over"));
    assert!(!other.write_host(host, b"else"));
}

#[test]
fn frontend_addresses() {
    let memory = three();
    let gpa = |address: u64| memory.vmm_va_to_gpa(1 << 40 | address).map(|gpa| gpa.0);
    assert_eq!(gpa(0x1000), Some(0x1000));
    assert_eq!(gpa(0x27ff), Some(0x27ff));
    assert_eq!(gpa(0x2800), None);
    assert_eq!(memory.vmm_va_to_gpa(0x1000), None);
}

#[test]
fn empty_memory_holds_nothing() {
    let memory = Memory::empty();
    assert_eq!(pieces(&memory, 0, 1), Err(OutsideMemory { address: 0, len: 1 }));
    assert_eq!(memory.vmm_va_to_gpa(0), None);
    assert!(!memory.poisoned());
}

/// With real files, which miri does not map.
#[cfg(not(miri))]
mod mapped {
    use nix::sys::memfd::{MFdFlags, memfd_create};
    use std::fs::OpenOptions;
    use std::os::fd::AsRawFd;
    use std::os::unix::fs::FileExt;

    use super::*;

    fn file(len: u64) -> File {
        let file = File::from(memfd_create("memory", MFdFlags::MFD_CLOEXEC).unwrap());
        file.set_len(len).unwrap();
        file
    }

    fn region(guest_address: u64, size: u64, file_offset: u64) -> RegionInfo {
        RegionInfo {
            guest_address,
            size,
            vmm_address: 0x7000_0000_0000 + guest_address,
            file_offset,
        }
    }

    #[test]
    fn regions_show_their_place_in_the_file() {
        let file = file(0x4000);
        // An offset inside a page, and a length that is no multiple of it.
        let (first, second) = (region(0x8000_0000, 0x1001, 0x1800), region(0x1000, 0x1000, 0));
        let regions = [(first, file.try_clone().unwrap()), (second, file.try_clone().unwrap())];
        let memory = Memory::from_regions(regions).unwrap();
        assert_eq!(memory.regions().collect::<Vec<_>>(), [second, first], "by guest address");

        memory.write(GuestAddress(0x8000_0000 + 0x1000), b"!").unwrap();
        let mut byte = [0];
        file.read_exact_at(&mut byte, 0x2800).unwrap();
        assert_eq!(&byte, b"!");
        assert!(memory.write(GuestAddress(0x8000_0000 + 0x1001), b"!").is_err());
        file.write_all_at(b"?", 0xfff).unwrap();
        memory.read(GuestAddress(0x1fff), &mut byte).unwrap();
        assert_eq!(&byte, b"?");
    }

    #[test]
    fn guest_memory_is_no_part_of_a_core_dump() {
        let memory = Memory::from_regions([(region(0, 1 << 20, 0), file(1 << 20))]).unwrap();
        let host = memory.contiguous(GuestAddress(0), 1).unwrap().addr();
        let maps = std::fs::read_to_string("/proc/self/smaps").unwrap();
        let mut lines = maps.lines().skip_while(|line| !line.starts_with(&format!("{host:x}-")));
        let flags = lines.find(|line| line.starts_with("VmFlags:")).unwrap();
        assert!(flags.split_ascii_whitespace().any(|flag| flag == "dd"), "{flags}");
    }

    #[test]
    fn a_snapshot_lives_as_long_as_it_is_held() {
        let first = region(0, 0x1000, 0);
        let second = region(0x1000, 0x1000, 0);
        let one = Memory::empty().with_region(first, file(0x1000)).unwrap();
        let two = one.with_region(second, file(0x1000)).unwrap();
        let host = |memory: &Memory| memory.contiguous(GuestAddress(0), 1).unwrap();
        assert_eq!(host(&one), host(&two), "what is mapped stays where it is");
        let without = two.without_region(RegionInfo { file_offset: 99, ..first }).unwrap();
        assert_eq!(without.regions().collect::<Vec<_>>(), [second]);
        let again = without.without_region(first);
        assert!(matches!(again, Err(MemoryError::NoSuchRegion(info)) if info == first));
        drop((one, without));
        two.write(GuestAddress(0), b"still there").unwrap();
    }

    #[test]
    fn regions_that_are_refused() {
        let base = region(0x10_0000, 0x1000, 0);
        let memory = Memory::empty().with_region(base, file(0x1000)).unwrap();
        let error = |info| memory.with_region(info, file(0x2000)).unwrap_err().to_string();
        let far = region(0x100_0000, 0x1000, 0);
        memory.with_region(far, file(0x2000)).unwrap();

        assert!(error(RegionInfo { size: 0, ..far }).ends_with("size is 0"));
        for (guest_address, size) in [(0x10_0fff, 1), (0xf_f000, 0x1001), (0xf_0000, 0x10_0000)] {
            let new = RegionInfo { guest_address, size, ..far };
            assert!(error(new).contains("overlaps the region at (guest address 0x100000"));
        }
        for top in [u64::MAX, u64::MAX - 0xfff, 1 << 63] {
            let text = error(RegionInfo { guest_address: top, ..far });
            assert!(text.contains("guest address plus size overflows"), "{text}");
            let text = error(RegionInfo { vmm_address: top, ..far });
            assert!(text.contains("frontend address plus size overflows"), "{text}");
            let text = error(RegionInfo { file_offset: top, ..far });
            assert!(text.contains("file offset plus size overflows"), "{text}");
        }
        let text = error(RegionInfo { size: 0x2001, ..far });
        assert!(text.contains("file has 8192 bytes, the region needs 8193"), "{text}");
        let text = error(RegionInfo { file_offset: 0x1001, ..far });
        assert!(text.contains("the region needs 8193"), "{text}");

        let directory = memory.with_region(far, File::open("/").unwrap());
        assert!(matches!(directory, Err(MemoryError::NotMappable(info)) if info == far));
        let write_only = reopened(&file(0x2000), File::options().write(true));
        assert!(matches!(memory.with_region(far, write_only), Err(MemoryError::Map { .. })));
    }

    /// The same file by another description.
    fn reopened(file: &File, how: &OpenOptions) -> File {
        how.open(format!("/proc/self/fd/{}", file.as_raw_fd())).unwrap()
    }

    #[test]
    fn a_file_that_may_only_be_read_is_read_and_never_written() {
        let own = file(0x1000);
        own.write_all_at(b"firmware", 0x10).unwrap();
        let rom = reopened(&own, File::options().read(true));
        let memory = Memory::empty().with_region(region(0x1000, 0x1000, 0), file(0x1000)).unwrap();
        let memory = memory.with_region(region(0x2000, 0x1000, 0), rom).unwrap();

        let mut bytes = [0; 8];
        memory.read(GuestAddress(0x2010), &mut bytes).unwrap();
        assert_eq!(&bytes, b"firmware");
        let host = memory.contiguous(GuestAddress(0x2010), 8).unwrap().cast_mut();
        assert!(!memory.write_host(host, b"overwrit"));
        assert!(!memory.zero_host(host, 8));
        // SAFETY: the bytes are this function's.
        assert!(!unsafe { memory.copy_to_host(host, bytes.as_ptr(), 8) });
        for (address, len) in [(0x2010, 8), (0x2fff, 1), (0x1fff, 2), (0x2000, u64::MAX)] {
            let read_only = Err(NotWritable::ReadOnly { address, len });
            assert_eq!(memory.check_writable(GuestAddress(address), len), read_only);
            assert_eq!(memory.contiguous_mut(GuestAddress(address), len), None);
        }
        assert!(memory.write(GuestAddress(0x1fff), b"ab").is_err());
        memory.read(GuestAddress(0x1fff), &mut bytes[..1]).unwrap();
        assert_eq!(bytes[0], 0, "nothing was written");
        memory.write(GuestAddress(0x1fff), b"a").unwrap();
        // Outside is outside, as before.
        assert_eq!(memory.check_writable(GuestAddress(0x3000), 1), Ok(()));
        let outside = OutsideMemory { address: 0x3000, len: 1 };
        assert_eq!(memory.write(GuestAddress(0x3000), b"a"), Err(outside.into()));

        let writable = memory.without_region(region(0x2000, 0x1000, 0)).unwrap();
        assert!(writable.contiguous_mut(GuestAddress(0x1000), 0x1000).is_some());
    }

    #[test]
    fn the_length_of_the_file_tells_what_became_of_a_page() {
        let short = file(0x2000);
        let info = region(0, 0x2000, 0);
        let memory = Memory::empty().with_region(info, short.try_clone().unwrap()).unwrap();
        assert_eq!(memory.loss(), None);
        short.set_len(0x1000).unwrap();
        memory.read(GuestAddress(0x1000), &mut [0]).unwrap();
        let loss = memory.loss().unwrap();
        assert_eq!(loss, Loss::Shortened { region: info, found: 0x1000 });
        let text = loss.to_string();
        assert!(text.contains("4096 bytes, the region needs 8192"), "{text}");
        // As if it had been something else.
        short.set_len(0x2000).unwrap();
        assert_eq!(memory.loss(), Some(Loss::NoPage { region: info }));
    }

    #[test]
    fn the_vm_memory_crate_sees_no_more_than_the_region_of_a_mapping() {
        let file = file(0x3000);
        file.write_all_at(b"before[inside]behind", 0x10f9).unwrap();
        let memory = Memory::empty().with_region(region(0, 8, 0x10ff), file).unwrap();
        let mut found = [0; 8];
        memory.read_slice(&mut found, GuestAddress(0)).unwrap();
        assert_eq!(&found, b"[inside]");
        assert!(memory.read_slice(&mut [0; 9], GuestAddress(0)).is_err());
        let only = memory.physical_memory().unwrap().iter().next().unwrap();
        assert!(only.get_slice(MemoryRegionAddress(1), 7).is_ok());
        for (offset, len) in [(0, 9), (8, 1), (u64::MAX, 1), (0x1000, 1)] {
            assert!(only.get_slice(MemoryRegionAddress(offset), len).is_err());
        }
    }

    #[test]
    fn as_many_regions_as_the_limit_says() {
        let file = file(0x1000);
        let next = |memory: &Memory| {
            let at = memory.regions().count() as u64 * 0x1000;
            memory.with_region(region(at, 0x1000, 0), file.try_clone().unwrap())
        };
        let full = (0..REGIONS_MAX).fold(Memory::empty(), |memory, _| next(&memory).unwrap());
        assert!(matches!(next(&full), Err(MemoryError::TooManyRegions)));
        let last = (REGIONS_MAX as u64 - 1) * 0x1000;
        full.write(GuestAddress(last), b"found").unwrap();
        assert_eq!(pieces(&full, last - 1, 0x1001), Ok(vec![1, 0x1000]));
    }

    #[test]
    fn a_shortened_file_poisons_every_snapshot_that_has_it() {
        let (short, kept) = (file(0x2000), file(0x1000));
        let lost =
            Memory::empty().with_region(region(0, 0x2000, 0), short.try_clone().unwrap()).unwrap();
        let both = lost.with_region(region(0x2000, 0x1000, 0), kept).unwrap();
        let rest = both.without_region(region(0, 0x2000, 0)).unwrap();
        short.set_len(0x1000).unwrap();
        assert!(!both.poisoned());
        let mut bytes = [1; 4];
        both.read(GuestAddress(0x1ffe), &mut bytes).unwrap();
        assert_eq!(bytes, [0; 4]);
        assert!(lost.poisoned() && both.poisoned());
        assert!(!rest.poisoned(), "it does not have the region");
    }
}
