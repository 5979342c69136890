/*
 * Tries what a sandbox must not let through, and prints a line for each: its name, and the error or `OK`.
 * Every attempt runs in a process of its own, and is harmless also where it succeeds: outside, as root, it shows that
 * the kernel has the call and would have done it, or that it looked at the arguments.
 */

#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/bpf.h>
#include <linux/filter.h>
#include <linux/keyctl.h>
#include <sys/mount.h>
#include <linux/perf_event.h>
#include <sched.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/personality.h>
#include <sys/prctl.h>
#include <sys/ptrace.h>
#include <sys/reboot.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#ifndef SYS_clone3
#define SYS_clone3 435
#endif
#ifndef SYS_mount_setattr
#define SYS_mount_setattr 442
#endif
#ifndef SYS_memfd_secret
#define SYS_memfd_secret 447
#endif

/* What is tried; the answer is that of the system call. */
struct attempt {
	const char *name;
	long (*run)(void);
};

static long cloned(long answer)
{
	if (answer == 0)
		_exit(0);
	return answer;
}

static char scratch[4096] __attribute__((aligned(4096)));

#define TRY(name, expression) static long try_##name(void) { return (expression); }

/* New namespaces. */
TRY(unshare_user, syscall(SYS_unshare, CLONE_NEWUSER))
TRY(unshare_mount, syscall(SYS_unshare, CLONE_NEWNS))
TRY(unshare_net, syscall(SYS_unshare, CLONE_NEWNET))
TRY(unshare_pid, syscall(SYS_unshare, CLONE_NEWPID))
TRY(unshare_ipc, syscall(SYS_unshare, CLONE_NEWIPC))
TRY(unshare_uts, syscall(SYS_unshare, CLONE_NEWUTS))
TRY(unshare_cgroup, syscall(SYS_unshare, CLONE_NEWCGROUP))
TRY(clone_user, cloned(syscall(SYS_clone, CLONE_NEWUSER | SIGCHLD, 0, 0, 0, 0)))
TRY(clone_mount, cloned(syscall(SYS_clone, CLONE_NEWNS | SIGCHLD, 0, 0, 0, 0)))
TRY(clone_pid, cloned(syscall(SYS_clone, CLONE_NEWPID | SIGCHLD, 0, 0, 0, 0)))
TRY(clone_high_bits, cloned(syscall(SYS_clone, 0xffff00000000UL | CLONE_NEWUTS | SIGCHLD, 0, 0, 0, 0)))
static long try_clone3_user(void)
{
	uint64_t arguments[11] = { CLONE_NEWUSER, 0, 0, 0, SIGCHLD };
	return cloned(syscall(SYS_clone3, arguments, sizeof arguments));
}
TRY(setns, syscall(SYS_setns, open("/proc/self/ns/net", O_RDONLY), 0))

/* Mounts. */
TRY(mount, mount("none", "/tmp", "tmpfs", 0, ""))
TRY(mount_bind, mount("/", "/tmp", NULL, MS_BIND, NULL))
TRY(mount_remount, mount(NULL, "/proc/sys", NULL, MS_REMOUNT | MS_BIND, NULL))
TRY(umount, syscall(SYS_umount2, "/no/such/place", 0))
TRY(pivot_root, syscall(SYS_pivot_root, "/no/such/place", "/no/such/place"))
TRY(chroot, chroot("/"))
TRY(fsopen, syscall(SYS_fsopen, "tmpfs", 0))
TRY(open_tree, syscall(SYS_open_tree, AT_FDCWD, "/", 1))
TRY(move_mount, syscall(SYS_move_mount, -1, "/no/such/place", -1, "/no/such/place", 0))
TRY(mount_setattr, syscall(SYS_mount_setattr, -1, "/no/such/place", 0, scratch, 32))

/* Other processes. */
TRY(ptrace, syscall(SYS_ptrace, PTRACE_TRACEME, 0, 0, 0))
static long try_process_vm_readv(void)
{
	struct iovec from = { scratch, 8 }, to = { scratch + 8, 8 };
	return syscall(SYS_process_vm_readv, getpid(), &to, 1, &from, 1, 0);
}
TRY(kcmp, syscall(SYS_kcmp, getpid(), getpid(), 0, 0, 0))
TRY(pidfd_getfd, syscall(SYS_pidfd_getfd, syscall(SYS_pidfd_open, getpid(), 0), 0, 0))
TRY(migrate_pages, syscall(SYS_migrate_pages, 0, 0, NULL, NULL))
TRY(move_pages, syscall(SYS_move_pages, 0, 0, NULL, NULL, NULL, 0))

/* Wide interfaces of the kernel. */
static long try_bpf(void)
{
	union bpf_attr attributes = { .map_type = BPF_MAP_TYPE_ARRAY, .key_size = 4, .value_size = 4, .max_entries = 1 };
	return syscall(SYS_bpf, BPF_MAP_CREATE, &attributes, sizeof attributes);
}
static long try_perf_event_open(void)
{
	struct perf_event_attr attributes = { .type = PERF_TYPE_SOFTWARE, .size = sizeof attributes };
	return syscall(SYS_perf_event_open, &attributes, 0, -1, -1, 0);
}
TRY(userfaultfd, syscall(SYS_userfaultfd, O_CLOEXEC))
TRY(keyctl, syscall(SYS_keyctl, KEYCTL_GET_KEYRING_ID, KEY_SPEC_PROCESS_KEYRING, 1))
TRY(add_key, syscall(SYS_add_key, "user", "attempt", "x", 1, KEY_SPEC_PROCESS_KEYRING))
TRY(request_key, syscall(SYS_request_key, NULL, NULL, NULL, 0))
TRY(io_uring_setup, syscall(SYS_io_uring_setup, 4, memset(scratch, 0, sizeof scratch)))
TRY(memfd_secret, syscall(SYS_memfd_secret, 0))
static long try_vmsplice(void)
{
	int ends[2];
	struct iovec from = { scratch, 8 };
	return pipe(ends) ? -1 : syscall(SYS_vmsplice, ends[1], &from, 1, 0);
}
static long try_name_to_handle_at(void)
{
	struct file_handle *handle = (void *)scratch;
	int mount_id;
	handle->handle_bytes = 128;
	return name_to_handle_at(AT_FDCWD, "/usr", handle, &mount_id, 0);
}
TRY(open_by_handle_at, syscall(SYS_open_by_handle_at, -1, scratch, O_RDONLY))
TRY(fanotify_init, syscall(SYS_fanotify_init, 0, 0))

/* Devices and terminals. */
static long made(const char *path, mode_t mode, dev_t device)
{
	unlink(path);
	long answer = syscall(SYS_mknodat, AT_FDCWD, path, mode, device);
	int error = errno;
	unlink(path);
	errno = error;
	return answer;
}
TRY(mknod_character, made("/tmp/.attempt-c", S_IFCHR | 0666, makedev(1, 3)))
TRY(mknod_block, made("/tmp/.attempt-b", S_IFBLK | 0666, makedev(7, 0)))
TRY(type_into_terminal, syscall(SYS_ioctl, -1, 0x5412UL, scratch))
TRY(type_into_terminal_high_bits, syscall(SYS_ioctl, -1, 0xdead00005412UL, scratch))
TRY(console, syscall(SYS_ioctl, -1, 0x541CUL, scratch))

/* Sockets beyond unix, inet and inet6, and those below TCP and UDP. */
TRY(socket_netlink, socket(AF_NETLINK, SOCK_RAW, 0))
TRY(socket_packet, socket(AF_PACKET, SOCK_RAW, 0))
TRY(socket_vsock, socket(AF_VSOCK, SOCK_STREAM, 0))
TRY(socket_alg, socket(AF_ALG, SOCK_SEQPACKET, 0))
TRY(socket_key, socket(AF_KEY, SOCK_RAW, 2))
TRY(socket_raw, socket(AF_INET, SOCK_RAW, 1))

/* The host's own state. */
TRY(own_filter, syscall(SYS_seccomp, 1, 0, NULL))
TRY(own_filter_prctl, prctl(PR_SET_SECCOMP, 2, NULL))
static long try_filter_of_socket(void)
{
	struct sock_filter all = { BPF_RET | BPF_K, 0, 0, 0xffff };
	struct sock_fprog program = { 1, &all };
	return setsockopt(socket(AF_UNIX, SOCK_DGRAM, 0), SOL_SOCKET, SO_ATTACH_FILTER, &program, sizeof program);
}
TRY(reboot, syscall(SYS_reboot, 0, 0, 0, NULL))
TRY(kexec_load, syscall(SYS_kexec_load, 0, 1000000, NULL, 0))
TRY(init_module, syscall(SYS_init_module, NULL, 0, ""))
TRY(delete_module, syscall(SYS_delete_module, "no-such-module", O_NONBLOCK))
TRY(swapon, syscall(SYS_swapon, "/no/such/file", 0))
TRY(swapoff, syscall(SYS_swapoff, "/no/such/file"))
TRY(acct, syscall(SYS_acct, "/no/such/file"))
TRY(quotactl, syscall(SYS_quotactl, 0, "/no/such/file", 0, NULL))
TRY(settimeofday, syscall(SYS_settimeofday, (void *)1, NULL))
TRY(clock_settime, syscall(SYS_clock_settime, CLOCK_REALTIME, (void *)1))
TRY(clock_adjtime, syscall(SYS_clock_adjtime, CLOCK_REALTIME, (void *)1))
TRY(syslog, syscall(SYS_syslog, 10, NULL, 0))
TRY(sethostname, syscall(SYS_sethostname, (void *)1, 1))
TRY(setdomainname, syscall(SYS_setdomainname, (void *)1, 1))
TRY(personality, syscall(SYS_personality, ADDR_NO_RANDOMIZE))
#ifdef __x86_64__
TRY(iopl, syscall(SYS_iopl, 0))
TRY(ioperm, syscall(SYS_ioperm, 0, 1, 0))
/* getpid(2) by the door for 32-bit programs. */
static long try_i386(void)
{
	long answer = 20;
	__asm__ volatile("int $0x80" : "+a"(answer) : : "r8", "r9", "r10", "r11", "memory");
	if (answer >= 0)
		return answer;
	errno = (int)-answer;
	return -1;
}
TRY(x32, syscall(0x40000000 + 39))
#endif

/* Files of /proc that reach into the host: only opened, never written. */
#define OPEN(name, path) TRY(name, open(path, O_WRONLY))
OPEN(write_core_pattern, "/proc/sys/kernel/core_pattern")
OPEN(write_hostname, "/proc/sys/kernel/hostname")
OPEN(write_panic, "/proc/sys/kernel/panic")
OPEN(write_overcommit, "/proc/sys/vm/overcommit_memory")
OPEN(write_forwarding, "/proc/sys/net/ipv4/ip_forward")
OPEN(write_sysrq, "/proc/sysrq-trigger")

#define ONE(name) { #name, try_##name }
static const struct attempt attempts[] = {
	ONE(unshare_user), ONE(unshare_mount), ONE(unshare_net), ONE(unshare_pid), ONE(unshare_ipc), ONE(unshare_uts),
	ONE(unshare_cgroup), ONE(clone_user), ONE(clone_mount), ONE(clone_pid), ONE(clone_high_bits), ONE(clone3_user),
	ONE(setns), ONE(mount), ONE(mount_bind), ONE(mount_remount), ONE(umount), ONE(pivot_root), ONE(chroot),
	ONE(fsopen), ONE(open_tree), ONE(move_mount), ONE(mount_setattr), ONE(ptrace), ONE(process_vm_readv), ONE(kcmp),
	ONE(pidfd_getfd), ONE(migrate_pages), ONE(move_pages), ONE(bpf), ONE(perf_event_open), ONE(userfaultfd),
	ONE(keyctl), ONE(add_key), ONE(request_key), ONE(io_uring_setup), ONE(memfd_secret), ONE(vmsplice),
	ONE(name_to_handle_at), ONE(open_by_handle_at), ONE(fanotify_init), ONE(mknod_character), ONE(mknod_block),
	ONE(type_into_terminal), ONE(type_into_terminal_high_bits), ONE(console), ONE(socket_netlink),
	ONE(socket_packet), ONE(socket_vsock), ONE(socket_alg), ONE(socket_key), ONE(socket_raw), ONE(reboot),
	ONE(kexec_load), ONE(init_module), ONE(delete_module), ONE(swapon), ONE(swapoff), ONE(acct), ONE(quotactl),
	ONE(settimeofday), ONE(clock_settime), ONE(clock_adjtime), ONE(syslog), ONE(sethostname), ONE(setdomainname),
	ONE(personality), ONE(own_filter), ONE(own_filter_prctl), ONE(filter_of_socket),
#ifdef __x86_64__
	ONE(iopl), ONE(ioperm), ONE(i386), ONE(x32),
#endif
	ONE(write_core_pattern), ONE(write_hostname), ONE(write_panic), ONE(write_overcommit), ONE(write_forwarding),
	ONE(write_sysrq),
};

int main(int count, char **arguments)
{
	/* What is mounted by way of proof is seen by nobody else, and goes with this process. */
	if (count > 1 && strcmp(arguments[1], "outside") == 0 &&
	    (unshare(CLONE_NEWNS) != 0 || mount(NULL, "/", NULL, MS_REC | MS_PRIVATE, NULL) != 0)) {
		perror("a private mount namespace");
		return 1;
	}
	setvbuf(stdout, NULL, _IONBF, 0);
	for (size_t i = 0; i < sizeof attempts / sizeof *attempts; i++) {
		pid_t pid = fork();
		if (pid < 0) {
			perror("fork");
			return 1;
		}
		if (pid == 0)
			_exit(attempts[i].run() < 0 ? errno : 0);
		int status = 0;
		waitpid(pid, &status, 0);
		if (WIFSIGNALED(status))
			printf("%s SIG%s\n", attempts[i].name, sigabbrev_np(WTERMSIG(status)));
		else
			printf("%s %s\n", attempts[i].name, WEXITSTATUS(status) ? strerrorname_np(WEXITSTATUS(status)) : "OK");
	}
	return 0;
}
