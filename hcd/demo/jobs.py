"""What a guest does: an init script and a library of shell functions for its jobs.

Protocol: lines ``HCD: key=value`` on the console. ``HCD: status=N`` is always the last one, N is the exit
status of the job; the guest then powers off. The job is a piece of shell that runs under ``set -e`` with the
functions below. Waiting in the guest is polling with an upper bound: busybox has nothing to wait with.
"""

from __future__ import annotations

from collections.abc import Iterable

from hcd.demo.initramfs import Tree
from hcd.demo.packages import GuestFiles

__all__ = ["BLOCK", "CONSOLE", "NET", "PCI", "RNG", "SCSI", "VSOCK", "base_tree", "job_tree"]

#: modules by what they serve; dependencies are found by themselves
PCI = ("virtio_pci",)
MMIO = ("virtio_mmio",)
BLOCK = ("virtio_blk",)
NET = ("virtio_net", "af_packet")
RNG = ("virtio_rng",)
CONSOLE = ("virtio_console",)
SCSI = ("virtio_scsi", "sd_mod", "sg")
VSOCK = ("vmw_vsock_virtio_transport",)

INIT = r"""#!/bin/busybox sh
export PATH=/bin:/sbin HOME=/ LC_ALL=C
/bin/busybox mkdir -p /proc /sys /dev /tmp /mnt
/bin/busybox mount -t proc proc /proc
/bin/busybox mount -t sysfs sys /sys
/bin/busybox mount -t devtmpfs dev /dev
/bin/busybox mount -t tmpfs -o size=90% tmp /tmp
/bin/busybox --install -s /bin
for module in $(cat /modules/order); do
    insmod /modules/$module.ko || echo "HCD: insmod-failed=$module"
done
echo "HCD: kernel=$(uname -r)"
( set -e; . /functions; . /job )
echo "HCD: status=$?"
sync
poweroff -f
"""

FUNCTIONS = r"""
say() { echo "HCD: $*"; }

# until_true SECONDS COMMAND...: poll until the command succeeds
until_true() {
    tries=$(( $1 * 50 )); shift
    while ! "$@" >/dev/null 2>&1; do
        tries=$(( tries - 1 ))
        if [ $tries -le 0 ]; then say "gave-up=$*"; return 1; fi
        usleep 20000
    done
}

hash_of() { sha256sum "$1" | cut -d' ' -f1; }

# verify_block DEVICE MIB [SKIP_MIB]: write random bytes, read them back from the device, compare
verify_block() {
    until_true 10 test -b $1
    dd if=/dev/urandom of=/tmp/out bs=1M count=$2 2>/dev/null
    dd if=/tmp/out of=$1 bs=64k seek=$(( ${3:-0} * 16 )) conv=fsync,notrunc oflag=direct 2>/dev/null
    echo 3 >/proc/sys/vm/drop_caches
    dd if=$1 of=/tmp/in bs=64k skip=$(( ${3:-0} * 16 )) count=$(( $2 * 16 )) iflag=direct 2>/dev/null
    say "block-written=$(hash_of /tmp/out)"
    say "block-read=$(hash_of /tmp/in)"
    cmp /tmp/out /tmp/in
    rm -f /tmp/out /tmp/in
}

# verify_filesystem DEVICE MIB: mkfs, mount, write, unmount, check, mount again, compare
verify_filesystem() {
    until_true 10 test -b $1
    mkfs.ext4 -q -F $1
    mount -t ext4 $1 /mnt
    dd if=/dev/urandom of=/tmp/out bs=1M count=$2 2>/dev/null
    cp /tmp/out /mnt/data
    umount /mnt
    fsck.ext4 -f -n $1 >/tmp/fsck 2>&1 || { cat /tmp/fsck; return 1; }
    say "fsck=clean"
    echo 3 >/proc/sys/vm/drop_caches
    mount -t ext4 $1 /mnt
    say "file-written=$(hash_of /tmp/out)"
    say "file-read=$(hash_of /mnt/data)"
    cmp /tmp/out /mnt/data
    rm -f /tmp/out
}

# draw_random BYTES: from the virtio entropy device
draw_random() {
    until_true 10 grep -q virtio_rng /sys/class/misc/hw_random/rng_available
    grep -q virtio_rng /sys/class/misc/hw_random/rng_current ||
        echo virtio_rng.0 >/sys/class/misc/hw_random/rng_current
    say "rng=$(cat /sys/class/misc/hw_random/rng_current)"
    dd if=/dev/hwrng of=/tmp/random bs=512 count=$(( $1 / 512 )) iflag=fullblock 2>/dev/null
    say "random-bytes=$(stat -c %s /tmp/random)"
    say "random-gzipped=$(gzip -c /tmp/random | wc -c)"
    say "random-hash=$(hash_of /tmp/random)"
}

# up INTERFACE ADDRESS/LENGTH
up() {
    until_true 10 test -e /sys/class/net/$1
    ip addr add $2 dev $1
    ip link set $1 up
    ip link set lo up
}

# ping_peer ADDRESS COUNT: waits for the peer first
ping_peer() {
    until_true ${PEER_SECONDS:-60} ping -c 1 -W 1 $1
    ping -c $2 -i 0.1 -W 5 $1 >/tmp/ping
    say "ping=$(awk '/packets transmitted/ {print $1 "/" $4}' /tmp/ping)"
}

# split_network INTERFACE: move it into a network namespace of its own; INSIDE runs a command there
split_network() {
    unshare -n sleep 3600 &
    NAMESPACE=$!
    until_true 10 other_network $NAMESPACE
    ip link set $1 netns $NAMESPACE
    INSIDE="nsenter -t $NAMESPACE -n"
}
other_network() { [ "$(readlink /proc/$1/ns/net)" != "$(readlink /proc/self/ns/net)" ]; }

# serve_file MIB: offer a file of random bytes by HTTP; returns at once
serve_file() {
    mkdir -p /tmp/www
    dd if=/dev/urandom of=/tmp/www/file bs=1M count=$1 2>/dev/null
    hash_of /tmp/www/file >/tmp/www/hash
    httpd -p 80 -h /tmp/www
    say "file-served=$(cat /tmp/www/hash)"
}

# get_file ADDRESS: fetch it and compare with the hash that the server computed
get_file() {
    until_true 60 wget -q -O /tmp/expected http://$1/hash
    wget -q -O /tmp/got http://$1/file
    say "file-got=$(hash_of /tmp/got)"
    [ "$(hash_of /tmp/got)" = "$(cat /tmp/expected)" ]
}
"""


def base_tree(files: GuestFiles, modules: Iterable[str], *, tools: Iterable[tuple[str, str]] = ()) -> Tree:
    """Everything but the job. ``tools`` are (program of the host, Debian package): same architecture only."""
    tree = Tree()
    tree.add_file("/bin/busybox", files.busybox.read_bytes(), executable=True)
    tree.add_link("/bin/sh", "busybox")
    tree.add_file("/init", INIT.encode(), executable=True)
    tree.add_file("/functions", FUNCTIONS.encode())
    for directory in ("/dev", "/mnt", "/proc", "/sbin", "/sys", "/tmp"):
        tree.add_directory(directory)
    tree.add_modules(files.modules, modules)
    for name, package in tools:
        tree.add_host_tool(name, package)
    return tree


def job_tree(job: str) -> Tree:
    """The job alone; its archive goes behind that of ``base_tree``."""
    tree = Tree()
    tree.add_file("/job", job.encode())
    return tree
