/*
 * Surroundings that are wrong for one process (LD_PRELOAD), as its environment says whenever it looks:
 * CLOCK_AHEAD is how many seconds its clock is ahead, and NSM_OPEN_ERRNO why /dev/nsm cannot be opened.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

static long number(const char *name)
{
	const char *text = getenv(name);
	return text ? atol(text) : 0;
}

int clock_gettime(clockid_t id, struct timespec *now)
{
	int failed = (int)syscall(SYS_clock_gettime, id, now);
	if (!failed && id == CLOCK_REALTIME)
		now->tv_sec += number("CLOCK_AHEAD");
	return failed;
}

time_t time(time_t *into)
{
	struct timespec now;
	clock_gettime(CLOCK_REALTIME, &now);
	if (into)
		*into = now.tv_sec;
	return now.tv_sec;
}

int gettimeofday(struct timeval *restrict into, void *restrict zone)
{
	struct timespec now;
	(void)zone;
	clock_gettime(CLOCK_REALTIME, &now);
	into->tv_sec = now.tv_sec;
	into->tv_usec = now.tv_nsec / 1000;
	return 0;
}

static int failing(const char *path)
{
	errno = (int)number("NSM_OPEN_ERRNO");
	return errno && !strcmp(path, "/dev/nsm");
}

#define OPENS(name) \
	int name(const char *path, int flags, ...) \
	{ \
		if (failing(path)) \
			return -1; \
		va_list rest; \
		va_start(rest, flags); \
		int mode = va_arg(rest, int); \
		va_end(rest); \
		return ((int (*)(const char *, int, ...))dlsym(RTLD_NEXT, #name))(path, flags, mode); \
	}
OPENS(open)
OPENS(open64)
