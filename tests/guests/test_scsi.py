"""Linux's virtio_scsi and sd drivers on hcd's SCSI host: QEMU's vhost-user-scsi, and user-mode Linux."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from hcd.demo import jobs, qemu, uml
from hcd.demo.console import Guest
from hcd.demo.hcd_process import HcdProcess, Resources

pytestmark = pytest.mark.guest

Boot = Callable[..., Guest]
Start = Callable[..., HcdProcess]
Settled = Callable[[HcdProcess, Resources], None]

HOST = """
[[device]]
name = "host"
type = "scsi"
socket = "{dir}/scsi.sock"
qmp = "{dir}/qmp.sock"
[device.options]
disk = DISKS
num-queues = 2
"""


def vm_with_host(directory: Path, bus: str, *, cpus: int = 2) -> qemu.Vm:
    host = qemu.scsi(directory / "scsi.sock", bus, queues=2)
    return qemu.Vm("q35", cpus=cpus, devices=host, qmp=[directory / "qmp.sock"])


def image(path: Path, mib: int) -> Path:
    with path.open("wb") as file:
        file.truncate(mib << 20)
    return path


#: disks by their serial number: the order in which they are found is not said
FIND_DISKS = """
disk_of() { grep -l "$1" /sys/block/sd*/device/vpd_pg80 | cut -d/ -f4; }
has_disk() { [ -n "$(disk_of $1)" ] && [ -b /dev/$(disk_of $1) ]; }
"""


THREE_DISKS = """[
    "{dir}/first.img,serial=first",
    "0:1={dir}/second.img,serial=second",
    "5=ram:16M,serial=third,block-size=4096",
]"""


@pytest.mark.parametrize("bus", ["modern", "legacy"])
def test_guest_reads_back_what_it_wrote(
    bus: str, short_dir: Path, start_hcd: Start, boot: Boot, expect_rings: Callable[..., None]
) -> None:
    """Three disks on two targets; what the guest wrote is in the images, and what it discarded is not."""
    first, second = image(short_dir / "first.img", 64), image(short_dir / "second.img", 32)
    hcd = start_hcd(HOST.replace("DISKS", THREE_DISKS))
    job = FIND_DISKS + """
    for name in first second third; do until_true 60 has_disk $name; done
    first=$(disk_of first) second=$(disk_of second) third=$(disk_of third)
    say "sizes=$(cat /sys/block/$first/size /sys/block/$second/size /sys/block/$third/size | xargs)"
    say "block=$(cat /sys/block/$third/queue/logical_block_size)"
    say "cache=$(cat /sys/block/$first/queue/write_cache)"
    verify_block /dev/$first 8
    verify_block /dev/$third 2
    dd if=/dev/urandom of=/tmp/out bs=64k count=64 2>/dev/null
    dd if=/tmp/out of=/dev/$second bs=64k conv=fsync,notrunc 2>/dev/null
    say "second=$(hash_of /tmp/out)"
    blkdiscard -o 2097152 -l 1048576 /dev/$second
    """
    said = boot(vm_with_host(short_dir, bus), job, jobs.SCSI).wait(400)
    assert said["sizes"] == f"{64 << 11} {32 << 11} {16 << 11}"
    assert said["block"] == "4096"
    assert said["cache"] == "write back"
    assert said["block-written"] == said["block-read"]
    expect_rings(hcd, "host", qemu.BUS_PATHS[bus], "qmp")
    with first.open("rb") as file:
        assert len(set(file.read(8 << 20))) == 256
    data = second.read_bytes()[: 4 << 20]
    assert data[2 << 20 : 3 << 20] == bytes(1 << 20)
    assert second.stat().st_blocks * 512 == 3 << 20
    metrics = hcd.metrics()
    for operation in ("read", "write", "flush", "unmap"):
        assert metrics.total("hcd_requests_total", device="host", op=operation, status="ok") > 0, operation


def test_file_system_and_two_queues(short_dir: Path, start_hcd: Start, boot: Boot) -> None:
    """mkfs, mount, write, check, read again; each processor rings a queue of its own."""
    path = image(short_dir / "first.img", 64)
    hcd = start_hcd(HOST.replace("DISKS", '"{dir}/first.img,serial=first"'))
    job = FIND_DISKS + """
    until_true 60 has_disk first
    say "queues=$(ls /sys/block/$(disk_of first)/mq | wc -l)"
    verify_filesystem /dev/$(disk_of first) 8
    for cpu in 0 1; do
        taskset -c $cpu dd if=/dev/$(disk_of first) of=/dev/null bs=64k count=16 iflag=direct 2>/dev/null
    done
    """
    said = boot(vm_with_host(short_dir, "modern"), job, (*jobs.SCSI, "ext4"), tools=True).wait(400)
    assert said["queues"] == "2"
    assert said["file-written"] == said["file-read"]
    assert path.stat().st_blocks * 512 > 8 << 20
    for queue in ("2", "3"):
        assert hcd.metrics().total("hcd_requests_total", device="host", queue=queue, op="read") > 0, f"queue {queue}"


def test_disks_grow_and_come_and_go(short_dir: Path, start_hcd: Start, boot: Boot) -> None:
    """What hcd is told of an image reaches the guest by an event, while it runs."""
    path = image(short_dir / "first.img", 16)
    disks = '["{dir}/first.img,serial=first", "0:1={dir}/late.img,serial=late,later"]'
    start_hcd(HOST.replace("DISKS", disks), daemon=f'[control]\npath = "{short_dir}/control.sock"')

    def look_again() -> None:
        command = [sys.executable, "-m", "hcd", "resize", "host", f"--control={short_dir}/control.sock"]
        subprocess.run(command, check=True, capture_output=True)

    job = FIND_DISKS + """
    until_true 60 has_disk first
    first=$(disk_of first)
    say "size=$(cat /sys/block/$first/size)"
    grown() { [ $(cat /sys/block/$first/size) = 49152 ]; }
    until_true 60 grown
    verify_block /dev/$first 1 20
    say "grown=$(cat /sys/block/$first/size)"
    until_true 60 has_disk late
    verify_block /dev/$(disk_of late) 1
    say "came=$(disk_of late)"
    gone() { ! grep -q late /sys/block/sd*/device/vpd_pg80; }
    until_true 60 gone
    say "gone=1"
    """
    guest = boot(vm_with_host(short_dir, "modern"), job, jobs.SCSI)
    assert guest.wait_for("size", 240) == str(16 << 11)
    os.truncate(path, 24 << 20)
    look_again()
    assert guest.wait_for("grown", 100) == str(24 << 11)
    image(short_dir / "late.img", 8)
    look_again()
    assert guest.wait_for("came", 100)
    (short_dir / "late.img").unlink()
    look_again()
    assert guest.wait_for("gone", 100) == "1"
    guest.wait(300)


#: commands of sg3_utils, each with what it says (a regular expression); "!" in front: it has to fail
SG = {
    "inq": ("sg_inq $disk", "VIRTUAL DISK"),
    "serial": ("sg_vpd -p sn $disk", "first"),
    "identity": ("sg_vpd -p di $disk", "designator type: NAA"),
    "limits": ("sg_vpd -p bl $disk", "Maximum unmap LBA count: 2097152"),
    "characteristics": ("sg_vpd -p bdc $disk", "Non-rotating medium"),
    "provisioning": ("sg_vpd -p lbpv $disk", "Unmap command supported .LBPU.: 1"),
    "capacity": ("sg_readcap --16 $disk", "Last LBA=32767"),
    "luns": ("sg_luns $disk", "Report luns"),
    "modes": ("sg_modes -a $disk", "WCE=1|Caching"),
    "opcodes": ("sg_opcodes $disk", "Synchronize cache.16"),
    "opcode": ("sg_opcodes --opcode=0x5f $disk", "not supported"),
    "ready": ("sg_turs -v $disk", ""),
    "sync": ("sg_sync $disk", ""),
    "verify": ("sg_verify --lba=0 --count=8 $disk", ""),
    "unmap": ("sg_unmap --force --lba=64 --num=64 $disk", ""),
    "same": ("sg_write_same --16 --lba=128 --num=64 --xferlen=512 --in=/dev/zero $disk", ""),
    "pattern": ("sg_write_same --10 --lba=200 --num=3 --xferlen=512 --in=/pattern $disk", ""),
    "compare": ("sg_verify --lba=201 --count=1 --ndo=512 --in=/pattern $disk", ""),
    "miscompare": ("!sg_verify --lba=203 --count=1 --ndo=512 --in=/pattern $disk", "miscompare"),
    "stop": ("sg_start --stop $disk", ""),
    "stopped": ("!sg_turs $disk", "not ready"),
    "start": ("sg_start --start $disk", ""),
    "sense": ("sg_requests $disk", ""),
    "reservation": ("!sg_persist --in --read-keys $disk", "not supported|Illegal request|Invalid opcode"),
    "reset": ("sg_reset --device $disk", ""),
}


def test_sg3_utils(short_dir: Path, start_hcd: Start, boot: Boot, need: Callable[..., None]) -> None:
    """Commands beyond those of the disk driver, by the tools that administrators use."""
    programs = sorted({line.split()[0].removeprefix("!") for line, _ in SG.values()})
    need(*programs)
    image(short_dir / "first.img", 16)
    hcd = start_hcd(HOST.replace("DISKS", '"{dir}/first.img,serial=first"'))
    job = FIND_DISKS + "until_true 60 has_disk first\ndisk=/dev/$(disk_of first)\n"
    job += "dd if=/dev/urandom of=/pattern bs=512 count=1 2>/dev/null\n"
    for name, (line, words) in SG.items():
        expected = "[ $status -ne 0 ]" if line.startswith("!") else "[ $status -eq 0 ]"
        job += f"""
        status=0; {line.removeprefix("!")} >/tmp/said 2>&1 || status=$?
        echo >>/tmp/said
        if {expected} && grep -qiE '{words}' /tmp/said
        then say "{name}=ok"; else say "{name}=$status $(tr '\n' ' ' </tmp/said)"; fi
        """
    tools = tuple((program, "sg3-utils") for program in programs)
    said = boot(vm_with_host(short_dir, "modern"), job, jobs.SCSI, tools=tools).wait(400)
    assert {name: said[name] for name in SG} == dict.fromkeys(SG, "ok")
    assert hcd.metrics().total("hcd_handler_errors_total", device="host") == 0
    data = (short_dir / "first.img").read_bytes()
    one = data[200 * 512 : 201 * 512]
    assert len(set(one)) > 100
    assert data[200 * 512 : 204 * 512] == one * 3 + bytes(512)


def test_user_mode_linux(
    short_dir: Path, start_hcd: Start, boot_uml: Boot, expect_rings: Callable[..., None], expect_settled: Settled
) -> None:
    """A front end that is not QEMU and takes the configuration space from hcd."""
    direct = HOST.replace('qmp = "{dir}/qmp.sock"', 'path = "direct"')
    hcd = start_hcd(direct.replace("DISKS", '"ram:16M,serial=first"'))
    before = hcd.resources()
    job = FIND_DISKS + "until_true 30 has_disk first\nverify_block /dev/$(disk_of first) 4"
    said = boot_uml(job, [(short_dir / "scsi.sock", uml.SCSI_ID)], jobs.SCSI).wait()
    assert said["block-written"] == said["block-read"]
    expect_rings(hcd, "host", "direct", "declared")
    expect_settled(hcd, before)
