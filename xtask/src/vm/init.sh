#!/bin/busybox sh
# The first program of the guest, from the initramfs: loads modules, makes a root of the host's (read only) below
# an overlay in memory, and goes on in there with guest.sh. What it cannot do, it says, and switches off.
set -e
trap 'echo "vm: init failed"; /bin/busybox poweroff -f' EXIT
/bin/busybox --install -s /bin
export PATH=/bin

mkdir -p /proc /sys /dev /host /memory /root
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
while read -r module; do insmod "/modules/$module"; done < /modules/order

mount -t virtiofs -o ro host /host
mount -t tmpfs -o size=75% memory /memory
mkdir /memory/upper /memory/work
mount -t overlay -o lowerdir=/host,upperdir=/memory/upper,workdir=/memory/work overlay /root

# What of the host is not the guest's: its processes, devices, run-time files and temporary files.
for dir in proc sys dev run; do
    mkdir -p "/root/$dir"
done
mount --move /proc /root/proc
mount --move /sys /root/sys
mount --move /dev /root/dev
mount -t tmpfs -o mode=755 run /root/run
mkdir -p /root/run/vm /root/run/tmp /root/dev/pts /root/dev/shm
chmod 1777 /root/run/tmp
mount -t virtiofs results /root/run/vm
mount -t devpts -o mode=620,ptmxmode=666 pts /root/dev/pts
mount -t tmpfs shm /root/dev/shm
# Where tests have their files: a file system with idmapped mounts and sparse files, as hosts have.
mount -t ext4 /root/dev/vda /root/run/tmp
chmod 1777 /root/run/tmp
mount -t cgroup2 -o nsdelegate,memory_recursiveprot cgroup2 /root/sys/fs/cgroup
ip link set lo up
hostname vm

trap - EXIT
exec switch_root /root /bin/sh /run/vm/guest.sh
