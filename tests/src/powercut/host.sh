# shellcheck shell=dash
# Functions of a guest that is the host of a daemon; what they do is a part of its script. `cache`, `format` and `wrong` are
# set before. What happens is told through the client (tests/src/flushed/told.rs); a line "failure" must never come.

socket=/run/socket
dumps=0

tell() { flush-client tell "$@"; }

fail() {
    dmesg | tail -n 40
    tell "failure $*"
    exit 1
}

# status WHAT COMMAND...: tells how it ended.
status() {
    status_of=$1
    shift
    status_code=0
    "$@" || status_code=$?
    tell "status $status_of $status_code"
}

# mount_disk FILE-SYSTEM DEVICE OPTIONS
mount_disk() {
    [ "$1" = ext4 ] || load_modules "$1"
    tell "boot $(cat /proc/sys/kernel/random/boot_id)"
    mount -t "$1" ${3:+-o "$3"} "$2" /mnt || fail "mount $1"
    tell mounted
}

# write_back_after CENTISECONDS: when the kernel writes what is dirty.
write_back_after() {
    echo "$1" >/proc/sys/vm/dirty_writeback_centisecs
    echo "$1" >/proc/sys/vm/dirty_expire_centisecs
}

# The file on top: each snapshot adds one.
top() {
    top_number=0
    while [ -e "/mnt/$((top_number + 1)).cow" ]; do top_number=$((top_number + 1)); done
    echo "/mnt/$top_number.cow"
}

next() {
    next_number=$(basename "$(top)" .cow)
    echo "/mnt/$((next_number + 1)).cow"
}

serve() {
    tell serving
    rm -f "$socket"
    serve_disk=$(top)
    [ -e "$serve_disk" ] || serve_disk=$serve_disk,/mnt/base0
    # A daemon on a host that lies: see wrong.c.
    set -- ${wrong:+env "LD_PRELOAD=/lib/wrong.so" "WRONG=$wrong"}
    # shellcheck disable=SC2154 # set before
    "$@" vhost-user-blk "--socket-path=$socket" --num-queues=2 "--cow-cache=$cache" "--format=$format" "$serve_disk" &
    daemon=$!
}

# The daemon ends, with everything flushed. Before it listens a signal would end it as it ends any program.
close_disk() {
    close_tries=0
    until [ -S "$socket" ]; do
        close_tries=$((close_tries + 1))
        [ "$close_tries" -lt 2400 ] || fail "the daemon does not listen"
        sleep 0.05
    done
    kill -TERM "$daemon"
    close_code=0
    wait "$daemon" || close_code=$?
    tell "closed $close_code"
    [ "$close_code" = 0 ] || fail "the daemon ended with $close_code"
}

# What a dead daemon had in its rings keeps the file system busy for a moment.
unmount_disk() {
    unmount_tries=0
    until umount /mnt 2>/dev/null; do
        unmount_tries=$((unmount_tries + 1))
        [ "$unmount_tries" -lt 1200 ] || fail umount
        sleep 0.05
    done
}

kill_daemon() {
    kill -KILL "$daemon"
    wait "$daemon" || true
}

# Reads the whole disk, to the next place of the second disk.
dump() {
    flush-client dump "$socket" /dev/vdb "$dumps" || fail "the disk cannot be read"
    dumps=$((dumps + 1))
}

# The file as the cut left it, merged; what stands in its journal has to be put in place before.
merge_after_cut() {
    merge_said=$(cow merge --quiet "$(top)" /tmp/merged 2>&1) || case $merge_said in
    *"check --repair"*)
        status repair cow check --repair "$(top)"
        status merge cow merge --quiet "$(top)" /tmp/merged
        ;;
    *) fail "merge after the cut: $merge_said" ;;
    esac
}

compare_merged() {
    status "compare with dump $1" flush-client same /tmp/merged 0 /dev/vdb "$1" "$(stat -c %s /tmp/merged)"
    rm /tmp/merged
}

# The file of a disk that is closed is sound, and holds what the last dump shows.
check_closed() {
    status check cow check "$(top)"
    status merge cow merge --quiet "$(top)" /tmp/merged
    compare_merged $((dumps - 1))
}

# The daemon dies while it does nothing: its successor must show the same.
kill_idle() {
    kill_daemon
    serve
    dump
    status "compare two dumps" flush-client same /dev/vdb $((dumps - 2)) /dev/vdb $((dumps - 1)) $((40 << 20))
}

# kill_under_load SEED PROGRAM SECONDS
kill_under_load() {
    flush-client run "$socket" "$1" "$2" completions &
    load=$!
    sleep "$3"
    kill_daemon
    # It may have ended by itself.
    kill -KILL "$load" 2>/dev/null || true
    wait "$load" || true
    serve
}

# tool NAME ARGUMENT...: a command of cow on the disk, which is closed.
tool() {
    tool_name=$1
    shift
    tell "tool $tool_name"
    tool_code=0
    cow "$tool_name" --quiet "$@" || tool_code=$?
    tell "tool-ended $tool_name $tool_code"
    [ "$tool_code" = 0 ] || fail "cow $tool_name ended with $tool_code"
}

tool_snapshot() { tool snapshot "$(top)" "$(next)"; }
tool_merge() { tool merge --in-place --yes "$(top)"; }
tool_reset() { tool reset "$(top)"; }
tool_rebase() { tool rebase --base /mnt/base1 "$(top)"; }
tool_resize() { tool resize "$(top)" "+$1"; }

# tool_again NAME SNAPSHOT: what a cut has interrupted comes to its end. A snapshot whose file is there is complete.
tool_again() {
    case $1 in
    snapshot)
        [ -e "$2" ] || cow snapshot --quiet "$(top)" "$2" || fail "a snapshot again"
        ;;
    merge)
        cow merge --quiet --in-place --yes "$(top)" || fail "a merge in place again"
        ;;
    esac
}

# play SEED PROGRAM MODE: until its end, or the cut.
play() { flush-client run "$socket" "$1" "$2" "$3" || fail "a request failed"; }
