# What the guest does once its root is there: has every controller, goes down into a group as a service has one, runs
# the suites that `suites` lists, and writes how each ended to `status`. It is pid 1, and ends with the machine.
. /run/vm/env
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root TMPDIR=/run/tmp

off() {
    sync
    busybox poweroff -f
}
trap off EXIT

groups=/sys/fs/cgroup
for controller in $(cat $groups/cgroup.controllers); do
    echo "+$controller" > $groups/cgroup.subtree_control
done
echo "vm: Linux $(uname -r), $(nproc) processors, cgroup v2 with $(cat $groups/cgroup.controllers)"

if [ -n "$VM_SHELL" ]; then
    setsid sh -c "exec sh -i < /dev/ttyS0 > /dev/ttyS0 2>&1"
    echo "shell 0 0" >> /run/vm/status
    exit
fi

# The tests' own programs are layers: on the disk, where their owners can be mapped.
cp -a /run/vm/programs /run/tmp/programs

# A line: name, seconds that it may take, directory, program, arguments.
while read -r name patience dir program arguments; do
    echo "vm: $name"
    begun=$(cut -d. -f1 /proc/uptime)
    mkdir -p "$groups/$name"
    # shellcheck disable=SC2086 # arguments are words
    (
        echo 0 > "$groups/$name/cgroup.procs"
        cd "$dir" && exec timeout --kill-after=10 "$patience" "$program" --color=never $arguments
    ) < /dev/null
    code=$?
    ended=$(cut -d. -f1 /proc/uptime)
    echo "$name $code $((ended - begun))" >> /run/vm/status
done < /run/vm/suites
echo "vm: done"
