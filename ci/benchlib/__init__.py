"""ci/bench: vhost-user-blk and qemu-storage-daemon side by side."""
