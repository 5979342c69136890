/* Attacks by name: `hostile NAME [ARGUMENT...]`. Each prints what it got, or the error that it met, a line each. */

#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
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

struct attack {
	const char *name;
	int (*run)(char **arguments);
};

static const struct attack attacks[] = {
	{ "extra-descriptors", extra_descriptors },
	{ "open-for-writing", open_for_writing },
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
