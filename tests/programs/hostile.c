/* Attacks by name: `hostile NAME [ARGUMENT...]`. Each prints what it got, or the error that it met, a line each. */

#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <signal.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/msg.h>
#include <sys/sem.h>
#include <sys/shm.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

static const char *answer(long result)
{
	return result < 0 ? strerrorname_np(errno) : "OK";
}

/* Opens each file for writing, and writes nothing. */
static int open_for_writing(char **paths)
{
	for (; *paths; paths++)
		printf("%s %s\n", *paths, answer(open(*paths, O_WRONLY | O_CLOEXEC)));
	return 0;
}

/* Reads from each file, and says how much there was. */
static int read_from(char **paths)
{
	static char bytes[4096];
	for (; *paths; paths++) {
		int fd = open(*paths, O_RDONLY | O_NONBLOCK | O_CLOEXEC);
		ssize_t length = fd < 0 ? -1 : read(fd, bytes, sizeof bytes);
		if (length < 0)
			printf("%s %s\n", *paths, strerrorname_np(errno));
		else
			printf("%s %s\n", *paths, length ? "READ" : "EMPTY");
		if (fd >= 0)
			close(fd);
	}
	return 0;
}

/* Types into its own terminal, by the number as it is and with more bits above it. */
static int type_into_terminal(char **arguments)
{
	(void)arguments;
	int master = posix_openpt(O_RDWR | O_NOCTTY);
	if (master < 0 || grantpt(master) != 0 || unlockpt(master) != 0) {
		printf("no terminal %s\n", strerrorname_np(errno));
		return 0;
	}
	pid_t pid = fork();
	if (pid == 0) {
		setsid();
		int slave = open(ptsname(master), O_RDWR);
		if (slave < 0 || ioctl(slave, TIOCSCTTY, 0) != 0)
			printf("no terminal of its own %s\n", strerrorname_np(errno));
		printf("plain %s\n", answer(syscall(SYS_ioctl, slave, 0x5412UL, "x")));
		printf("high-bits %s\n", answer(syscall(SYS_ioctl, slave, 0xdead00005412UL, "x")));
		_exit(0);
	}
	waitpid(pid, NULL, 0);
	return 0;
}

/* Connects to each ADDRESS PORT, and sends a datagram there. */
static int connect_to(char **arguments)
{
	for (; arguments[0] && arguments[1]; arguments += 2) {
		struct sockaddr_in to = { .sin_family = AF_INET, .sin_port = htons(atoi(arguments[1])) };
		struct timeval patience = { .tv_sec = 2 };
		inet_pton(AF_INET, arguments[0], &to.sin_addr);
		int stream = socket(AF_INET, SOCK_STREAM, 0), datagram = socket(AF_INET, SOCK_DGRAM, 0);
		setsockopt(stream, SOL_SOCKET, SO_SNDTIMEO, &patience, sizeof patience);
		printf("%s:%s %s", arguments[0], arguments[1], answer(connect(stream, (void *)&to, sizeof to)));
		printf(" %s\n", answer(sendto(datagram, "x", 1, 0, (void *)&to, sizeof to)));
	}
	return 0;
}

/* Connects to abstract sockets. */
static int connect_abstract(char **names)
{
	for (; *names; names++) {
		struct sockaddr_un to = { .sun_family = AF_UNIX };
		strncpy(to.sun_path + 1, *names, sizeof to.sun_path - 2);
		int fd = socket(AF_UNIX, SOCK_STREAM, 0);
		socklen_t length = offsetof(struct sockaddr_un, sun_path) + 1 + strlen(*names);
		printf("%s %s\n", *names, answer(connect(fd, (void *)&to, length)));
	}
	return 0;
}

/* Objects of System V IPC with this key: whether they are there. */
static void find_ipc(key_t key)
{
	printf("shm %s\nsem %s\nmsg %s\n", answer(shmget(key, 0, 0)), answer(semget(key, 0, 0)), answer(msgget(key, 0)));
	fflush(stdout);
}

static int ipc_find(char **arguments)
{
	if (arguments[1])
		sleep(atoi(arguments[1]));
	find_ipc(atoi(arguments[0]));
	return 0;
}

/* Makes them, keeps them until stdin ends or for SECONDS, and removes them. */
static int ipc_hold(char **arguments)
{
	key_t key = atoi(arguments[0]);
	int shm = shmget(key, 4096, IPC_CREAT | 0666), sem = semget(key, 1, IPC_CREAT | 0666), msg = msgget(key, IPC_CREAT | 0666);
	find_ipc(key);
	char byte;
	if (arguments[1])
		sleep(atoi(arguments[1]));
	else
		(void)!read(0, &byte, 1);
	shmctl(shm, IPC_RMID, NULL);
	semctl(sem, 0, IPC_RMID);
	msgctl(msg, IPC_RMID, NULL);
	return 0;
}

/* Says on every descriptor that the program has succeeded, as init does on the report pipe, and fails. */
static int forge_the_end(char **arguments)
{
	(void)arguments;
	unsigned char record[24] = { 3 };
	struct timespec now;
	clock_gettime(CLOCK_MONOTONIC, &now);
	uint64_t at = now.tv_sec * 1000000000ull + now.tv_nsec;
	memcpy(record + 16, &at, sizeof at);
	signal(SIGPIPE, SIG_IGN);
	for (int fd = 3; fd < 1024; fd++)
		(void)!write(fd, record, sizeof record);
	return 7;
}

/* Descriptors beyond 0, 1 and 2. */
static int extra_descriptors(char **arguments)
{
	(void)arguments;
	for (int fd = 3; fd < 1024; fd++) {
		char link[64], target[256] = "?";
		if (fcntl(fd, F_GETFD) < 0)
			continue;
		snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
		ssize_t length = readlink(link, target, sizeof target - 1);
		target[length > 0 ? length : 0] = 0;
		printf("%d %s\n", fd, target);
	}
	return 0;
}

#ifndef SO_NETNS_COOKIE
#define SO_NETNS_COOKIE 71
#endif

/* The kernel's own number of the network namespace, which is never given twice. */
static int network_cookie(char **arguments)
{
	(void)arguments;
	uint64_t cookie = 0;
	socklen_t length = sizeof cookie;
	int fd = socket(AF_INET, SOCK_DGRAM, 0);
	if (getsockopt(fd, SOL_SOCKET, SO_NETNS_COOKIE, &cookie, &length) != 0)
		printf("%s\n", strerrorname_np(errno));
	else
		printf("%llu\n", (unsigned long long)cookie);
	return 0;
}

/* Waits at a socket PATH for a descriptor, and holds it until the file PATH.done is there. */
static int hold_descriptor(char **arguments)
{
	struct sockaddr_un at = { .sun_family = AF_UNIX };
	char done[128], byte, control[CMSG_SPACE(sizeof(int))];
	struct iovec part = { &byte, 1 };
	struct msghdr message = { .msg_iov = &part, .msg_iovlen = 1, .msg_control = control, .msg_controllen = sizeof control };
	strncpy(at.sun_path, arguments[0], sizeof at.sun_path - 1);
	snprintf(done, sizeof done, "%s.done", arguments[0]);
	int listener = socket(AF_UNIX, SOCK_STREAM, 0);
	if (bind(listener, (void *)&at, sizeof at) != 0 || chmod(arguments[0], 0777) != 0 || listen(listener, 1) != 0)
		return 91;
	ssize_t length = recvmsg(accept(listener, NULL, NULL), &message, 0);
	printf("%s\n", length == 1 && CMSG_FIRSTHDR(&message) ? "HELD" : "nothing came");
	for (int tries = 0; access(done, F_OK) != 0 && tries < 3000; tries++)
		usleep(20000);
	return 0;
}

/* Listens at the loopback address, at PORT, and hands the socket to whoever waits at PATH. */
static int leave_listener(char **arguments)
{
	struct sockaddr_in here = { .sin_family = AF_INET, .sin_port = htons(atoi(arguments[1])) };
	struct sockaddr_un to = { .sun_family = AF_UNIX };
	char byte = 0, control[CMSG_SPACE(sizeof(int))];
	struct iovec part = { &byte, 1 };
	struct msghdr message = { .msg_iov = &part, .msg_iovlen = 1, .msg_control = control, .msg_controllen = sizeof control };
	inet_pton(AF_INET, "127.0.0.1", &here.sin_addr);
	strncpy(to.sun_path, arguments[0], sizeof to.sun_path - 1);
	int listener = socket(AF_INET, SOCK_STREAM, 0), other = socket(AF_UNIX, SOCK_STREAM, 0);
	if (bind(listener, (void *)&here, sizeof here) != 0 || listen(listener, 5) != 0)
		return 91;
	if (connect(other, (void *)&to, sizeof to) != 0)
		return 92;
	struct cmsghdr *header = CMSG_FIRSTHDR(&message);
	header->cmsg_level = SOL_SOCKET;
	header->cmsg_type = SCM_RIGHTS;
	header->cmsg_len = CMSG_LEN(sizeof(int));
	memcpy(CMSG_DATA(header), &listener, sizeof listener);
	printf("%s\n", sendmsg(other, &message, 0) == 1 ? "LEFT" : strerrorname_np(errno));
	return 0;
}

struct attack {
	const char *name;
	int (*run)(char **arguments);
};

static const struct attack attacks[] = {
	{ "connect", connect_to },
	{ "connect-abstract", connect_abstract },
	{ "extra-descriptors", extra_descriptors },
	{ "forge-the-end", forge_the_end },
	{ "hold-descriptor", hold_descriptor },
	{ "ipc-find", ipc_find },
	{ "ipc-hold", ipc_hold },
	{ "leave-listener", leave_listener },
	{ "network-cookie", network_cookie },
	{ "open-for-writing", open_for_writing },
	{ "read", read_from },
	{ "type-into-terminal", type_into_terminal },
};

int main(int count, char **arguments)
{
	setvbuf(stdout, NULL, _IOLBF, 0);
	for (size_t i = 0; count > 1 && i < sizeof attacks / sizeof *attacks; i++)
		if (strcmp(arguments[1], attacks[i].name) == 0)
			return attacks[i].run(arguments + 2);
	fprintf(stderr, "no attack of this name\n");
	return 90;
}
