/* Small programs for the tests, in one: `probe WHAT [ARGUMENT...]`. Each ends in one well-known way. */

#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/shm.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define MIB (1024L * 1024L)

static void fail(const char *what)
{
	fprintf(stderr, "%s: %s\n", what, strerror(errno));
	exit(90);
}

/* Writes to every page, so that the memory is really used. */
static void touch(volatile char *memory, long bytes)
{
	for (long at = 0; at < bytes; at += 4096)
		memory[at] = 1;
}

static long cpu_ms(void)
{
	struct timespec now;
	clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &now);
	return now.tv_sec * 1000 + now.tv_nsec / 1000000;
}

static void spin(long ms)
{
	volatile unsigned long counter = 0;
	while (cpu_ms() < ms)
		for (int i = 0; i < 10000; i++)
			counter++;
}

/* Sends a signal to this process, in its default disposition and unblocked. */
static int raise_signal(int number)
{
	sigset_t all;
	sigemptyset(&all);
	sigprocmask(SIG_SETMASK, &all, NULL);
	if (kill(getpid(), number) != 0)
		fail("kill");
	printf("alive\n");
	return 0;
}

static int recurse(int depth)
{
	volatile char frame[4096];
	frame[0] = (char)depth;
	return recurse(depth + 1) + frame[0];
}

static int heap(long mib)
{
	for (long done = 0; done < mib; done++) {
		char *memory = malloc(MIB);
		if (!memory)
			fail("malloc");
		touch(memory, MIB);
	}
	printf("held %ld\n", mib);
	return 0;
}

static int map(long mib)
{
	char *memory = mmap(NULL, mib * MIB, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (memory == MAP_FAILED)
		fail("mmap");
	touch(memory, mib * MIB);
	printf("held %ld\n", mib);
	return 0;
}

/* Address space alone costs nothing. */
static int reserve(long gib)
{
	void *memory = mmap(NULL, gib * 1024 * MIB, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	if (memory == MAP_FAILED)
		fail("mmap");
	printf("reserved\n");
	return 0;
}

static int system_v(long mib)
{
	int id = shmget(IPC_PRIVATE, mib * MIB, IPC_CREAT | 0600);
	if (id < 0)
		fail("shmget");
	char *memory = shmat(id, NULL, 0);
	if (memory == (void *)-1)
		fail("shmat");
	touch(memory, mib * MIB);
	return 0;
}

static int anonymous_file(long mib)
{
	int fd = memfd_create("probe", 0);
	if (fd < 0)
		fail("memfd_create");
	char page[4096] = { 1 };
	for (long at = 0; at < mib * MIB; at += 4096)
		if (write(fd, page, sizeof page) != sizeof page)
			fail("write");
	return 0;
}

/* Memory that is given back may be taken again. */
static int twice(long mib)
{
	for (int round = 0; round < 4; round++) {
		char *memory = mmap(NULL, mib * MIB, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
		if (memory == MAP_FAILED)
			fail("mmap");
		touch(memory, mib * MIB);
		munmap(memory, mib * MIB);
	}
	return 0;
}

/* Children that hold memory at one time, while the parent only waits. */
static int children(int count, long mib)
{
	for (int child = 0; child < count; child++) {
		pid_t pid = fork();
		if (pid < 0)
			fail("fork");
		if (pid == 0) {
			map(mib);
			pause();
		}
	}
	while (wait(NULL) > 0)
		;
	sleep(20);
	printf("survived\n");
	return 0;
}

/* A process below this many others uses the processor. */
static int spin_below(int depth, long ms)
{
	if (depth == 0) {
		spin(ms);
		return 0;
	}
	pid_t pid = fork();
	if (pid < 0)
		fail("fork");
	if (pid == 0)
		_exit(spin_below(depth - 1, ms));
	int status = 0;
	waitpid(pid, &status, 0);
	return WIFEXITED(status) ? WEXITSTATUS(status) : 99;
}

/* Short children one after another: none of them lives when the next one runs. */
static int spin_in_turn(int count, long ms)
{
	for (int child = 0; child < count; child++)
		spin_below(1, ms);
	return 0;
}

/* Forks until it cannot, and says how often it could and why no more. */
static int forks(void)
{
	int made = 0;
	for (;;) {
		pid_t pid = fork();
		if (pid == 0) {
			pause();
			_exit(0);
		}
		if (pid < 0)
			break;
		made++;
	}
	printf("%d %s\n", made, strerrorname_np(errno));
	return 0;
}

static void *rest(void *unused)
{
	(void)unused;
	pause();
	return NULL;
}

static int threads(void)
{
	int made = 0, error = 0;
	pthread_attr_t attributes;
	pthread_attr_init(&attributes);
	pthread_attr_setstacksize(&attributes, 64 * 1024);
	pthread_t thread;
	while ((error = pthread_create(&thread, &attributes, rest, NULL)) == 0)
		made++;
	printf("%d %s\n", made, strerrorname_np(error));
	return 0;
}

static int __attribute__((noreturn)) bomb(void)
{
	for (;;)
		fork();
}

/* New sessions all the time, each of which goes on when its parent has ended. */
static int __attribute__((noreturn)) flee(void)
{
	signal(SIGTERM, SIG_IGN);
	for (;;) {
		if (fork() > 0)
			_exit(0);
		setsid();
	}
}

/* A daemon, as daemon(3) makes it, that keeps stdout. */
static int leave_daemon(void)
{
	if (fork() == 0) {
		setsid();
		if (fork() > 0)
			_exit(0);
		signal(SIGTERM, SIG_IGN);
		signal(SIGHUP, SIG_IGN);
		for (;;)
			pause();
	}
	printf("left\n");
	return 0;
}

static int write_file(const char *path, long bytes)
{
	static char block[65536];
	int fd = open(path, O_WRONLY | O_CREAT | O_TRUNC, 0644);
	if (fd < 0)
		fail(path);
	while (bytes > 0) {
		ssize_t count = write(fd, block, bytes < (long)sizeof block ? bytes : (long)sizeof block);
		if (count < 0)
			fail("write");
		bytes -= count;
	}
	return 0;
}

/* Copies a file to stdout. */
static int show(const char *path)
{
	char block[65536];
	int fd = open(path, O_RDONLY);
	if (fd < 0)
		fail(path);
	ssize_t count;
	while ((count = read(fd, block, sizeof block)) > 0)
		if (write(1, block, count) != count)
			fail("write");
	return 0;
}

static int bus(void)
{
	int fd = memfd_create("probe", 0);
	volatile char *memory = mmap(NULL, 4096, PROT_READ, MAP_SHARED, fd, 0);
	return memory[0];
}

static int lock(long bytes)
{
	char *memory = malloc(bytes);
	if (mlock(memory, bytes) == 0)
		return 0;
	printf("%s\n", strerrorname_np(errno));
	return 3;
}

static volatile int zero = 0;

int main(int count, char **arguments)
{
	setvbuf(stdout, NULL, _IONBF, 0);
	const char *what = count > 1 ? arguments[1] : "";
	long first = count > 2 ? atol(arguments[2]) : 0;
	long second = count > 3 ? atol(arguments[3]) : 0;
#define IS(name) (strcmp(what, name) == 0)
	if (IS("exit")) return (int)first;
	if (IS("signal")) return raise_signal((int)first);
	if (IS("null")) return *(volatile int *)0;
	if (IS("divide")) return 7 / zero;
	if (IS("trap")) __builtin_trap();
	if (IS("abort")) abort();
	if (IS("bus")) return bus();
	if (IS("recurse")) return recurse(0);
	if (IS("heap")) return heap(first);
	if (IS("map")) return map(first);
	if (IS("reserve")) return reserve(first);
	if (IS("system-v")) return system_v(first);
	if (IS("memfd")) return anonymous_file(first);
	if (IS("twice")) return twice(first);
	if (IS("lock")) return lock(first);
	if (IS("children")) return children((int)first, second);
	if (IS("spin")) return spin_below(0, first);
	if (IS("spin-below")) return spin_below((int)first, second);
	if (IS("spin-in-turn")) return spin_in_turn((int)first, second);
	if (IS("forks")) return forks();
	if (IS("threads")) return threads();
	if (IS("bomb")) return bomb();
	if (IS("flee")) return flee();
	if (IS("daemon")) return leave_daemon();
	if (IS("show")) return show(arguments[2]);
	if (IS("write")) return write_file(arguments[2], second);
	fprintf(stderr, "probe: no such thing: %s\n", what);
	return 91;
}
