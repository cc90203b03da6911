/*
 * Makes one file system call of a process fail, or raises a signal beside it (LD_PRELOAD).
 *
 * What to do stands in a `struct chaos` that is shared with whoever watches: mapped from the file
 * that CHAOS_STATE names when the process starts, or handed in by chaos_attach. Without one, every
 * call goes straight to the C library. The variable is taken out of the environment, so that a
 * program that the process becomes is left alone.
 *
 * A call is "ours" when it is about something below `root`: by absolute path, by a path relative to
 * a descriptor that was opened there, by /proc/self/fd/N of such a descriptor, or by the descriptor
 * itself. Calls of ours are counted for each function, logged, and held against what was asked
 * for. execve is always ours. The counts are shared by forked children: there is one order of
 * calls, not one for each process.
 *
 * Not covered: the C library's calls to itself (fopen, mkstemp, glob), direct system calls other
 * than through `syscall`, and mmap. 64-bit only: there the names with 64 are aliases.
 */
#undef _FILE_OFFSET_BITS /* would rename the functions defined here */
#undef _FORTIFY_SOURCE   /* would define them a second time */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif

#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <time.h>
#include <unistd.h>

_Static_assert(sizeof(void *) == 8 && sizeof(off_t) == 8, "64-bit systems only");

/* The functions that are told apart; several names of the C library may be one of them. */
#define FUNCTIONS(X) \
	X(open) X(write) X(fsync) X(fchmod) X(fchown) X(link) X(rename) X(exchange) X(noreplace) \
	X(unlink) X(symlink) X(stat) X(fstat) X(access) X(readlink) X(lock) X(truncate) X(close) \
	X(opendir) X(readdir) X(mkdir) X(execve)

#define ENUMERATOR(name) F_##name,
enum function { FUNCTIONS(ENUMERATOR) FUNCTION_COUNT };
#undef ENUMERATOR

#define FUNCTION_NAME(name) #name,
static const char *const names[] = { FUNCTIONS(FUNCTION_NAME) };
#undef FUNCTION_NAME

enum action { NOTHING, FAIL, SIGNAL_BEFORE, SIGNAL_AFTER, FILL };

#define ENTRIES 1024
#define NAME 64

struct entry {
	int32_t function, result, error, flags;
	char first[NAME], second[NAME]; /* last parts of the paths */
};

/* Mirrored in tests/chaos/state.py. */
struct chaos {
	_Atomic int32_t armed;
	int32_t function, occurrence, action, value; /* what to do at which call */
	int32_t sticky;       /* every later call of that function fails too */
	int32_t pause_ms;     /* time that a signal gets to be taken before the call goes on */
	int32_t then_signal;  /* after a hit: this signal */
	int32_t then_after;   /* before the so many-th call that follows */
	int32_t refuse_tmpfile, refuse_renameat2;
	_Atomic int32_t hit, hit_entry, hit_process, executing, readable, calls;
	int32_t allowed_mode; /* bits that a file of ours may have beside 0700 */
	_Atomic int32_t counts[32];
	char root[256], filler[256];
	struct entry log[ENTRIES];
};

static struct chaos *chaos;
static _Atomic unsigned char ours[65536]; /* descriptors that were opened below the root */

typedef _Atomic(void *) slot;

static int missing(void)
{
	errno = ENOSYS;
	return -1;
}

static void *next(slot *known, const char *name)
{
	void *found = atomic_load_explicit(known, memory_order_relaxed);
	if (!found) {
		found = dlsym(RTLD_NEXT, name);
		if (!found)
			found = (void *)missing;
		atomic_store_explicit(known, found, memory_order_relaxed);
	}
	return found;
}

#define NEXT(result, name, ...) \
	static slot known_##name; \
	result (*next_##name)(__VA_ARGS__) = (result (*)(__VA_ARGS__))next(&known_##name, #name)

#define ALIAS(name, target) __asm__(".globl " #name "\n.set " #name ", " #target "\n")

/* A system call that nothing here counts. */
static long raw(long number, long a, long b, long c, long d, long e, long f)
{
	NEXT(long, syscall, long, ...);
	return next_syscall(number, a, b, c, d, e, f);
}

int chaos_function_count(void) { return FUNCTION_COUNT; }
const char *chaos_function_name(int function) { return names[function]; }
size_t chaos_size(void) { return sizeof(struct chaos); }
void chaos_attach(void *state) { chaos = state; }

__attribute__((constructor)) static void attach_from_environment(void)
{
	const char *path = getenv("CHAOS_STATE");
	if (!path)
		return;
	int fd = (int)raw(SYS_openat, AT_FDCWD, (long)path, O_RDWR | O_CLOEXEC, 0, 0, 0);
	if (fd < 0)
		abort(); /* a run that nothing is done to would pass for a good one */
	void *state = mmap(NULL, sizeof(struct chaos), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	raw(SYS_close, fd, 0, 0, 0, 0, 0);
	if (state == MAP_FAILED)
		abort();
	unsetenv("CHAOS_STATE");
	chaos = state;
}

static int is_armed(void)
{
	return chaos && atomic_load(&chaos->armed);
}

static int is_ours(int fd)
{
	return is_armed() && fd >= 0 && fd < (int)sizeof ours && ours[fd];
}

static int is_below(int folder, const char *path)
{
	const char *opaque = *(const char *volatile *)&path; /* callers do pass NULL */
	if (!is_armed())
		return 0;
	if (!opaque)
		return is_ours(folder);
	if (opaque[0] != '/')
		return is_ours(folder);
	size_t length = strlen(chaos->root);
	if (strncmp(opaque, chaos->root, length) == 0 && (opaque[length] == '/' || !opaque[length]))
		return 1;
	int fd;
	return sscanf(opaque, "/proc/self/fd/%d", &fd) == 1 && is_ours(fd);
}

static void mark(int fd, int is)
{
	if (fd >= 0 && fd < (int)sizeof ours)
		ours[fd] = (unsigned char)is;
}

static void copy_name(char *to, const char *path)
{
	const char *last = path ? strrchr(path, '/') : NULL;
	if (path && strncmp(path, "/proc/", 6) == 0)
		last = NULL;
	snprintf(to, NAME, "%s", !path ? "" : last ? last + 1 : path);
}

static void pause_for(int milliseconds)
{
	struct timespec left = { milliseconds / 1000, milliseconds % 1000 * 1000000L };
	while (raw(SYS_nanosleep, (long)&left, (long)&left, 0, 0, 0, 0) != 0 && errno == EINTR)
		;
}

static void raise_signal(int number)
{
	int saved = errno;
	raw(SYS_kill, raw(SYS_getpid, 0, 0, 0, 0, 0, 0), number, 0, 0, 0, 0);
	pause_for(chaos->pause_ms);
	errno = saved;
}

/* Takes every block and every inode that the file system has left. */
static void fill(void)
{
	static const char block[4096];
	char path[320];
	int saved = errno;
	long fd = raw(SYS_openat, AT_FDCWD, (long)chaos->filler, O_CREAT | O_WRONLY | O_CLOEXEC, 0600, 0, 0);
	while (fd >= 0 && raw(SYS_write, fd, (long)block, sizeof block, 0, 0, 0) > 0)
		;
	raw(SYS_close, fd, 0, 0, 0, 0, 0);
	for (int number = 0; number < 4096; number++) {
		snprintf(path, sizeof path, "%s-%d", chaos->filler, number);
		if (raw(SYS_mknodat, AT_FDCWD, (long)path, S_IFREG | 0600, 0, 0, 0) != 0)
			break;
	}
	errno = saved;
}

struct call {
	int entry, chosen;
};

/* Counts and logs a call, and does what was asked for before it; whether it is to fail. */
static int enter(struct call *call, enum function function, const char *first, const char *second, int flags)
{
	int occurrence = atomic_fetch_add(&chaos->counts[function], 1) + 1;
	int entry = atomic_fetch_add(&chaos->calls, 1);
	call->entry = entry < ENTRIES ? entry : ENTRIES - 1;
	struct entry *line = &chaos->log[call->entry];
	copy_name(line->first, first);
	copy_name(line->second, second);
	line->flags = flags;
	line->result = line->error = 0;
	line->function = function;
	if (function == F_execve)
		atomic_store(&chaos->executing, 1);
	int hit = atomic_load(&chaos->hit);
	if (hit && chaos->then_signal && entry == atomic_load(&chaos->hit_entry) + chaos->then_after)
		raise_signal(chaos->then_signal);
	call->chosen = chaos->action && chaos->function == (int)function
		&& (occurrence == chaos->occurrence || (chaos->sticky && occurrence > chaos->occurrence));
	if (!call->chosen)
		return 0;
	if (atomic_fetch_add(&chaos->hit, 1) == 0) {
		atomic_store(&chaos->hit_entry, entry);
		atomic_store(&chaos->hit_process, (int)raw(SYS_getpid, 0, 0, 0, 0, 0, 0));
	}
	if (chaos->action == SIGNAL_BEFORE)
		raise_signal(chaos->value);
	if (chaos->action == FILL)
		fill();
	if (chaos->action != FAIL || function == F_close)
		return 0;
	line->result = -1;
	line->error = chaos->value;
	errno = chaos->value;
	if (function == F_execve)
		atomic_store(&chaos->executing, 0);
	return 1;
}

/* Notes what became of a call, and does what was asked for after it. */
static void leave(const struct call *call, long result)
{
	chaos->log[call->entry].result = result < 0 ? -1 : 0;
	chaos->log[call->entry].error = result < 0 ? errno : 0;
	if (call->chosen && chaos->action == SIGNAL_AFTER)
		raise_signal(chaos->value);
}

static void check_mode(int folder, const char *path)
{
	struct stat status;
	int saved = errno;
	long found = path ? raw(SYS_newfstatat, folder, (long)path, (long)&status, AT_SYMLINK_NOFOLLOW, 0, 0)
			  : raw(SYS_fstat, folder, (long)&status, 0, 0, 0, 0);
	if (found == 0 && S_ISREG(status.st_mode) && status.st_mode & 0077 & ~(unsigned)chaos->allowed_mode)
		atomic_store(&chaos->readable, 1);
	errno = saved;
}

/* The body of a wrapper whose call fails with -1: `is` tells whether it is ours. */
#define WRAP(is, function, first, second, flags, expression) \
	do { \
		if (!(is)) \
			return expression; \
		struct call call; \
		if (enter(&call, function, first, second, flags)) \
			return -1; \
		__typeof__(expression) result = expression; \
		leave(&call, result); \
		return result; \
	} while (0)

static int opened(int flags, const struct call *call, int fd)
{
	if (fd >= 0)
		mark(fd, 1);
	if (fd >= 0 && (flags & O_CREAT || (flags & O_TMPFILE) == O_TMPFILE))
		check_mode(fd, NULL);
	leave(call, fd);
	return fd;
}

#define OPEN(folder, path, flags, expression) \
	do { \
		if (!is_below(folder, path)) { \
			int fd = expression; \
			mark(fd, 0); \
			return fd; \
		} \
		struct call call; \
		if (enter(&call, F_open, path, NULL, flags)) \
			return -1; \
		if (chaos->refuse_tmpfile && ((flags) & O_TMPFILE) == O_TMPFILE) { \
			errno = EOPNOTSUPP; \
			leave(&call, -1); \
			return -1; \
		} \
		return opened(flags, &call, expression); \
	} while (0)

#define MODE_OF(flags, mode) \
	do { \
		if (((flags) & O_CREAT) || ((flags) & O_TMPFILE) == O_TMPFILE) { \
			va_list rest; \
			va_start(rest, flags); \
			(mode) = va_arg(rest, mode_t); \
			va_end(rest); \
		} \
	} while (0)

int open(const char *path, int flags, ...)
{
	NEXT(int, open, const char *, int, ...);
	mode_t mode = 0;
	MODE_OF(flags, mode);
	OPEN(AT_FDCWD, path, flags, next_open(path, flags, mode));
}
ALIAS(open64, open);

int openat(int folder, const char *path, int flags, ...)
{
	NEXT(int, openat, int, const char *, int, ...);
	mode_t mode = 0;
	MODE_OF(flags, mode);
	OPEN(folder, path, flags, next_openat(folder, path, flags, mode));
}
ALIAS(openat64, openat);

int __open_2(const char *path, int flags)
{
	NEXT(int, __open_2, const char *, int);
	OPEN(AT_FDCWD, path, flags, next___open_2(path, flags));
}
ALIAS(__open64_2, __open_2);

int __openat_2(int folder, const char *path, int flags)
{
	NEXT(int, __openat_2, int, const char *, int);
	OPEN(folder, path, flags, next___openat_2(folder, path, flags));
}
ALIAS(__openat64_2, __openat_2);

int creat(const char *path, mode_t mode)
{
	NEXT(int, creat, const char *, mode_t);
	OPEN(AT_FDCWD, path, O_CREAT | O_WRONLY | O_TRUNC, next_creat(path, mode));
}
ALIAS(creat64, creat);

int close(int fd)
{
	NEXT(int, close, int);
	int is = is_ours(fd);
	mark(fd, 0);
	WRAP(is, F_close, NULL, NULL, 0, next_close(fd));
}

ssize_t write(int fd, const void *data, size_t size)
{
	NEXT(ssize_t, write, int, const void *, size_t);
	WRAP(is_ours(fd), F_write, NULL, NULL, 0, next_write(fd, data, size));
}

ssize_t pwrite(int fd, const void *data, size_t size, off_t offset)
{
	NEXT(ssize_t, pwrite, int, const void *, size_t, off_t);
	WRAP(is_ours(fd), F_write, NULL, NULL, 0, next_pwrite(fd, data, size, offset));
}
ALIAS(pwrite64, pwrite);

ssize_t sendfile(int to, int from, off_t *offset, size_t size)
{
	NEXT(ssize_t, sendfile, int, int, off_t *, size_t);
	WRAP(is_ours(to), F_write, NULL, NULL, 0, next_sendfile(to, from, offset, size));
}
ALIAS(sendfile64, sendfile);

int fsync(int fd)
{
	NEXT(int, fsync, int);
	WRAP(is_ours(fd), F_fsync, NULL, NULL, 0, next_fsync(fd));
}

int fdatasync(int fd)
{
	NEXT(int, fdatasync, int);
	WRAP(is_ours(fd), F_fsync, NULL, NULL, 0, next_fdatasync(fd));
}

static int change_mode(int fd, mode_t mode)
{
	NEXT(int, fchmod, int, mode_t);
	int result = next_fchmod(fd, mode);
	if (result == 0)
		check_mode(fd, NULL);
	return result;
}

int fchmod(int fd, mode_t mode)
{
	NEXT(int, fchmod, int, mode_t);
	if (!is_ours(fd))
		return next_fchmod(fd, mode);
	WRAP(1, F_fchmod, NULL, NULL, (int)mode, change_mode(fd, mode));
}

int fchmodat(int folder, const char *path, mode_t mode, int flags)
{
	NEXT(int, fchmodat, int, const char *, mode_t, int);
	WRAP(is_below(folder, path), F_fchmod, path, NULL, (int)mode, next_fchmodat(folder, path, mode, flags));
}

int chmod(const char *path, mode_t mode)
{
	NEXT(int, chmod, const char *, mode_t);
	WRAP(is_below(AT_FDCWD, path), F_fchmod, path, NULL, (int)mode, next_chmod(path, mode));
}

int fchown(int fd, uid_t user, gid_t group)
{
	NEXT(int, fchown, int, uid_t, gid_t);
	WRAP(is_ours(fd), F_fchown, NULL, NULL, 0, next_fchown(fd, user, group));
}

int fchownat(int folder, const char *path, uid_t user, gid_t group, int flags)
{
	NEXT(int, fchownat, int, const char *, uid_t, gid_t, int);
	WRAP(is_below(folder, path), F_fchown, path, NULL, 0, next_fchownat(folder, path, user, group, flags));
}

int link(const char *from, const char *to)
{
	NEXT(int, link, const char *, const char *);
	WRAP(is_below(AT_FDCWD, from) || is_below(AT_FDCWD, to), F_link, from, to, 0, next_link(from, to));
}

static int linked(int from_folder, const char *from, int to_folder, const char *to, int flags)
{
	NEXT(int, linkat, int, const char *, int, const char *, int);
	int result = next_linkat(from_folder, from, to_folder, to, flags);
	if (result == 0)
		check_mode(to_folder, to);
	return result;
}

int linkat(int from_folder, const char *from, int to_folder, const char *to, int flags)
{
	NEXT(int, linkat, int, const char *, int, const char *, int);
	if (!is_below(from_folder, from) && !is_below(to_folder, to))
		return next_linkat(from_folder, from, to_folder, to, flags);
	WRAP(1, F_link, from, to, flags, linked(from_folder, from, to_folder, to, flags));
}

int rename(const char *from, const char *to)
{
	NEXT(int, rename, const char *, const char *);
	WRAP(is_below(AT_FDCWD, from) || is_below(AT_FDCWD, to), F_rename, from, to, 0, next_rename(from, to));
}

int renameat(int from_folder, const char *from, int to_folder, const char *to)
{
	NEXT(int, renameat, int, const char *, int, const char *);
	WRAP(is_below(from_folder, from) || is_below(to_folder, to), F_rename, from, to, 0,
		next_renameat(from_folder, from, to_folder, to));
}

static int rename2(int from_folder, const char *from, int to_folder, const char *to, unsigned int flags)
{
	if (chaos->refuse_renameat2 && flags)
		return errno = chaos->refuse_renameat2, -1;
	return (int)raw(SYS_renameat2, from_folder, (long)from, to_folder, (long)to, flags, 0);
}

int renameat2(int from_folder, const char *from, int to_folder, const char *to, unsigned int flags)
{
	if (!is_below(from_folder, from) && !is_below(to_folder, to))
		return (int)raw(SYS_renameat2, from_folder, (long)from, to_folder, (long)to, flags, 0);
	enum function function = flags & RENAME_EXCHANGE ? F_exchange : flags & RENAME_NOREPLACE ? F_noreplace : F_rename;
	WRAP(1, function, from, to, (int)flags, rename2(from_folder, from, to_folder, to, flags));
}

long syscall(long number, ...)
{
	long a[6];
	va_list rest;
	va_start(rest, number);
	for (int place = 0; place < 6; place++)
		a[place] = va_arg(rest, long);
	va_end(rest);
	if (number == SYS_renameat2 && is_armed())
		return renameat2((int)a[0], (const char *)a[1], (int)a[2], (const char *)a[3], (unsigned int)a[4]);
	return raw(number, a[0], a[1], a[2], a[3], a[4], a[5]);
}

int unlink(const char *path)
{
	NEXT(int, unlink, const char *);
	WRAP(is_below(AT_FDCWD, path), F_unlink, path, NULL, 0, next_unlink(path));
}

int unlinkat(int folder, const char *path, int flags)
{
	NEXT(int, unlinkat, int, const char *, int);
	WRAP(is_below(folder, path), F_unlink, path, NULL, flags, next_unlinkat(folder, path, flags));
}

int symlink(const char *from, const char *to)
{
	NEXT(int, symlink, const char *, const char *);
	WRAP(is_below(AT_FDCWD, to), F_symlink, from, to, 0, next_symlink(from, to));
}

int symlinkat(const char *from, int folder, const char *to)
{
	NEXT(int, symlinkat, const char *, int, const char *);
	WRAP(is_below(folder, to), F_symlink, from, to, 0, next_symlinkat(from, folder, to));
}

int mkdir(const char *path, mode_t mode)
{
	NEXT(int, mkdir, const char *, mode_t);
	WRAP(is_below(AT_FDCWD, path), F_mkdir, path, NULL, 0, next_mkdir(path, mode));
}

int mkdirat(int folder, const char *path, mode_t mode)
{
	NEXT(int, mkdirat, int, const char *, mode_t);
	WRAP(is_below(folder, path), F_mkdir, path, NULL, 0, next_mkdirat(folder, path, mode));
}

int stat(const char *restrict path, struct stat *restrict status)
{
	NEXT(int, stat, const char *, struct stat *);
	WRAP(is_below(AT_FDCWD, path), F_stat, path, NULL, 0, next_stat(path, status));
}
ALIAS(stat64, stat);

int lstat(const char *restrict path, struct stat *restrict status)
{
	NEXT(int, lstat, const char *, struct stat *);
	WRAP(is_below(AT_FDCWD, path), F_stat, path, NULL, 0, next_lstat(path, status));
}
ALIAS(lstat64, lstat);

int fstatat(int folder, const char *restrict path, struct stat *restrict status, int flags)
{
	NEXT(int, fstatat, int, const char *, struct stat *, int);
	WRAP(is_below(folder, path), F_stat, path, NULL, flags, next_fstatat(folder, path, status, flags));
}
ALIAS(fstatat64, fstatat);

int fstat(int fd, struct stat *status)
{
	NEXT(int, fstat, int, struct stat *);
	WRAP(is_ours(fd), F_fstat, NULL, NULL, 0, next_fstat(fd, status));
}
ALIAS(fstat64, fstat);

int statx(int folder, const char *restrict path, int flags, unsigned int mask, struct statx *restrict status)
{
	NEXT(int, statx, int, const char *, int, unsigned int, struct statx *);
	WRAP(is_below(folder, path), F_stat, path, NULL, flags, next_statx(folder, path, flags, mask, status));
}

int access(const char *path, int mode)
{
	NEXT(int, access, const char *, int);
	WRAP(is_below(AT_FDCWD, path), F_access, path, NULL, mode, next_access(path, mode));
}

int faccessat(int folder, const char *path, int mode, int flags)
{
	NEXT(int, faccessat, int, const char *, int, int);
	WRAP(is_below(folder, path), F_access, path, NULL, mode, next_faccessat(folder, path, mode, flags));
}

int euidaccess(const char *path, int mode)
{
	NEXT(int, euidaccess, const char *, int);
	WRAP(is_below(AT_FDCWD, path), F_access, path, NULL, mode, next_euidaccess(path, mode));
}
ALIAS(eaccess, euidaccess);

ssize_t readlink(const char *restrict path, char *restrict to, size_t size)
{
	NEXT(ssize_t, readlink, const char *, char *, size_t);
	WRAP(is_below(AT_FDCWD, path), F_readlink, path, NULL, 0, next_readlink(path, to, size));
}

ssize_t readlinkat(int folder, const char *restrict path, char *restrict to, size_t size)
{
	NEXT(ssize_t, readlinkat, int, const char *, char *, size_t);
	WRAP(is_below(folder, path), F_readlink, path, NULL, 0, next_readlinkat(folder, path, to, size));
}

int flock(int fd, int operation)
{
	NEXT(int, flock, int, int);
	WRAP(is_ours(fd), F_lock, NULL, NULL, operation, next_flock(fd, operation));
}

static int control(int fd, int command, void *argument)
{
	NEXT(int, fcntl, int, int, ...);
	int result = next_fcntl(fd, command, argument);
	if ((command == F_DUPFD || command == F_DUPFD_CLOEXEC) && result >= 0)
		mark(result, is_ours(fd));
	return result;
}

int fcntl(int fd, int command, ...)
{
	va_list rest;
	va_start(rest, command);
	void *argument = va_arg(rest, void *);
	va_end(rest);
	int locks = command == F_SETLK || command == F_SETLKW || command == F_OFD_SETLK || command == F_OFD_SETLKW;
	WRAP(locks && is_ours(fd), F_lock, NULL, NULL, command, control(fd, command, argument));
}
ALIAS(fcntl64, fcntl);

int dup(int fd)
{
	NEXT(int, dup, int);
	int result = next_dup(fd);
	if (result >= 0)
		mark(result, is_ours(fd));
	return result;
}

int dup2(int from, int to)
{
	NEXT(int, dup2, int, int);
	int result = next_dup2(from, to);
	if (result >= 0 && from != to)
		mark(to, is_ours(from));
	return result;
}

int dup3(int from, int to, int flags)
{
	NEXT(int, dup3, int, int, int);
	int result = next_dup3(from, to, flags);
	if (result >= 0)
		mark(to, is_ours(from));
	return result;
}

int ftruncate(int fd, off_t size)
{
	NEXT(int, ftruncate, int, off_t);
	WRAP(is_ours(fd), F_truncate, NULL, NULL, 0, next_ftruncate(fd, size));
}
ALIAS(ftruncate64, ftruncate);

DIR *opendir(const char *path)
{
	NEXT(DIR *, opendir, const char *);
	if (!is_below(AT_FDCWD, path))
		return next_opendir(path);
	struct call call;
	if (enter(&call, F_opendir, path, NULL, 0))
		return NULL;
	DIR *folder = next_opendir(path);
	leave(&call, folder ? 0 : -1);
	if (folder)
		mark(dirfd(folder), 1);
	return folder;
}

DIR *fdopendir(int fd)
{
	NEXT(DIR *, fdopendir, int);
	if (!is_ours(fd))
		return next_fdopendir(fd);
	struct call call;
	if (enter(&call, F_opendir, NULL, NULL, 0))
		return NULL;
	DIR *folder = next_fdopendir(fd);
	leave(&call, folder ? 0 : -1);
	return folder;
}

int closedir(DIR *folder)
{
	NEXT(int, closedir, DIR *);
	mark(dirfd(folder), 0);
	return next_closedir(folder);
}

struct dirent *readdir(DIR *folder)
{
	NEXT(struct dirent *, readdir, DIR *);
	if (!is_ours(dirfd(folder)))
		return next_readdir(folder);
	struct call call;
	if (enter(&call, F_readdir, NULL, NULL, 0))
		return NULL;
	struct dirent *entry = next_readdir(folder);
	leave(&call, 0);
	return entry;
}
ALIAS(readdir64, readdir);

int execve(const char *path, char *const arguments[], char *const environment[])
{
	NEXT(int, execve, const char *, char *const[], char *const[]);
	if (!is_armed())
		return next_execve(path, arguments, environment);
	struct call call;
	if (enter(&call, F_execve, path, NULL, 0))
		return -1;
	int result = next_execve(path, arguments, environment);
	atomic_store(&chaos->executing, 0);
	leave(&call, result);
	return result;
}
