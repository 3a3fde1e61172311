# shellcheck shell=sh
# /lib/guest.sh inside the guests: what their scripts are written with.

# result KEY VALUE...: a line for the harness.
result() {
    result_key=$1
    shift
    printf '\n@@%s=%s\n' "$result_key" "$*"
}

# check KEY COMMAND...: runs the command; the result is "ok" or "failed: STATUS". Its output goes to
# the console, and the script goes on.
check() {
    check_key=$1
    shift
    check_status=0
    "$@" || check_status=$?
    if [ "$check_status" = 0 ]; then
        result "$check_key" ok
    else
        result "$check_key" "failed: $check_status"
    fi
}

# digest FILE-OR-DEVICE [BLOCK-SIZE]: its sha256, read past the page cache.
# A disk of UML's own ubd driver needs blocks of 4k: its multi-page reads return wrong data where a
# page mixes COW and base sectors.
digest() { dd if="$1" bs="${2:-1M}" iflag=direct 2>/dev/null | sha256sum | cut -d' ' -f1; }

# busybox's shell takes its own programs before those in PATH, and these can do less.
blkdiscard() { /sbin/blkdiscard "$@"; }
fstrim() { /sbin/fstrim "$@"; }

# load_modules NAME...: modules of host.cpio (ci/guest-image), with what they need.
load_modules() {
    load_tree=/lib/modules/$(uname -r)
    for load_name; do
        while read -r load_file; do
            load_module=$(basename "$load_file" .ko | tr - _)
            [ -d "/sys/module/$load_module" ] || insmod "$load_tree/$load_file" || return
        done <"$load_tree/order.$load_name"
    done
}

# fsync FILE...
fsync() {
    for fsync_file; do
        dd if=/dev/null of="$fsync_file" conv=notrunc,fsync 2>/dev/null || return
    done
}
