/*
 * Puts the software NSM behind /dev/nsm, or a software TPM behind /dev/tpmrm0 and /dev/tpm0, for one process and its
 * children (LD_PRELOAD).
 *
 * Covered: the absolute paths in open, openat, their 64-bit and fortified names, access, faccessat,
 * euidaccess, eaccess, stat, lstat, fstatat, statx and their older and 64-bit names; on the descriptor ioctl, fstat
 * and lseek, and a TPM's read, write and poll. Not covered: static programs and direct system calls (Go), fopen (the C library calls its own open),
 * creat, other spellings of the path, directory listings, extended attributes, and read, write, poll and mmap on
 * the descriptor of the NSM.
 *
 * There is no state here. open hands out a socket connected to the Unix SEQPACKET socket that the environment names
 * in NITROSIM_NSM_SOCKET; ioctl knows the descriptor by the name of its peer and dials anew for each request. So
 * fork, dup, exec and threads need no care, and no two requests can mix. A TPM's descriptor is a connection to the
 * socket in NITROSIM_TPM_SOCKET: a command is one write, its response one read, as on the device. Without these
 * variables, and for every other file, each call goes straight to the C library.
 *
 * The kernel's behaviour is that of drivers/misc/nsm.c and drivers/char/tpm in Linux, but for a read of the TPM
 * before any write, which waits here. 64-bit only: there the names with 64 are aliases.
 */
#undef _FILE_OFFSET_BITS /* would rename the functions defined here */
#undef _FORTIFY_SOURCE   /* would define them a second time */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif

#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <sys/types.h>
#include <sys/un.h>
#include <termios.h>
#include <unistd.h>

_Static_assert(sizeof(void *) == 8 && sizeof(off_t) == 8, "64-bit systems only");

#define DEVICE "/dev/nsm"
#define LIKENESS "/dev/null" /* the character device that stat starts from */
#define DEVICE_MAJOR 10      /* misc devices, linux/major.h */
#define DEVICE_MINOR 122
#define DEVICE_MODE (S_IFCHR | 0666)
#define TPM_MAJOR 253 /* dynamic */
#define TPM_MODE (S_IFCHR | 0660)

/* linux/nsm.h: _IOWR(0x0A, 0, struct nsm_raw) and its limits */
#define NSM_IOCTL_RAW 0xC0200A00u
#define NSM_REQUEST_MAX_SIZE 0x1000u
#define NSM_RESPONSE_MAX_SIZE 0x3000u

struct nsm_raw {
	struct { uint64_t addr, len; } request, response;
};

#ifdef __GLIBC__
typedef unsigned long ioctl_command;
#else
typedef int ioctl_command; /* POSIX, musl */
#endif

/* The next definition of a function after this one, looked up once. */
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

/* Another name for the same function; not the alias attribute, since the C libraries declare it with other types. */
#define ALIAS(name, target) __asm__(".globl " #name "\n.set " #name ", " #target "\n")

/* Which device a path or a descriptor is of. */
enum device { NONE, NSM, TPM };

/* The address of a device's simulator; 0 without one. */
static socklen_t simulator(enum device device, struct sockaddr_un *address)
{
	const char *path = getenv(device == TPM ? "NITROSIM_TPM_SOCKET" : "NITROSIM_NSM_SOCKET");
	size_t length = path ? strlen(path) : 0;
	if (length == 0 || length >= sizeof address->sun_path)
		return 0;
	memset(address, 0, sizeof *address);
	address->sun_family = AF_UNIX;
	memcpy(address->sun_path, path, length);
	return (socklen_t)(offsetof(struct sockaddr_un, sun_path) + length + 1);
}

static enum device device_of(const char *path)
{
	struct sockaddr_un address;
	/* volatile: the C library promises the compiler that no caller passes NULL, and callers do */
	const char *opaque = *(const char *volatile *)&path;
	enum device device = NONE;
	if (opaque && strcmp(opaque, DEVICE) == 0)
		device = NSM;
	else if (opaque && (strcmp(opaque, "/dev/tpmrm0") == 0 || strcmp(opaque, "/dev/tpm0") == 0))
		device = TPM;
	return device != NONE && simulator(device, &address) ? device : NONE;
}

/* Whether a descriptor was handed out for a device. Leaves errno alone. */
static int is_of(enum device device, int fd)
{
	struct sockaddr_un address, peer;
	socklen_t length = sizeof peer;
	int saved = errno;
	memset(&peer, 0, sizeof peer);
	int ours = simulator(device, &address) && getpeername(fd, (struct sockaddr *)&peer, &length) == 0
		&& peer.sun_family == AF_UNIX && memcmp(&peer.sun_path, &address.sun_path, sizeof peer.sun_path) == 0;
	errno = saved;
	return ours;
}

/* A connection to a device's simulator, or -1 with errno. */
static int dial(enum device device, int flags)
{
	struct sockaddr_un address;
	socklen_t length = simulator(device, &address);
	int fd = socket(AF_UNIX, SOCK_SEQPACKET | flags, 0);
	if (fd < 0)
		return -1;
	while (connect(fd, (struct sockaddr *)&address, length) != 0) {
		if (errno == EINTR)
			continue;
		int reason = errno;
		close(fd);
		errno = reason;
		return -1;
	}
	return fd;
}

/*
 * Opens a device. The NSM's is a connection that only marks the descriptor, so that the simulator can forget its end
 * of it; the TPM's carries commands and responses.
 */
static int open_device(enum device device, int flags)
{
	int saved = errno;
	if ((flags & (O_CREAT | O_EXCL)) == (O_CREAT | O_EXCL))
		return errno = EEXIST, -1;
	if (flags & O_DIRECTORY)
		return errno = ENOTDIR, -1;
	int fd = dial(device, flags & O_CLOEXEC ? SOCK_CLOEXEC : 0);
	if (fd < 0) {
		if (errno == ECONNREFUSED)
			errno = ENXIO; /* a node without a device behind it */
		return -1;
	}
	if (device == NSM)
		shutdown(fd, SHUT_WR);
	errno = saved;
	return fd;
}

/*
 * memcpy between this process and itself that fails with EFAULT where memcpy would crash: the kernel checks both
 * addresses on the way through a pipe. Up to PIPE_BUF bytes.
 */
static int checked_copy(void *to, const void *from, size_t size)
{
	int ends[2];
	if (pipe2(ends, O_CLOEXEC) != 0)
		return -1;
	int done = write(ends[1], from, size) == (ssize_t)size && read(ends[0], to, size) == (ssize_t)size;
	int reason = errno;
	close(ends[0]);
	close(ends[1]);
	errno = reason;
	return done ? 0 : -1;
}

/* Sends the request and receives the answer; its whole length, or -1 with EFAULT or EIO. */
static ssize_t exchange(int fd, const struct nsm_raw *raw)
{
	ssize_t length;
	/* The driver waits where signals do not reach it, so none ends the wait here. */
	do
		length = send(fd, (const void *)(uintptr_t)raw->request.addr, raw->request.len, MSG_NOSIGNAL);
	while (length < 0 && errno == EINTR);
	if (length < 0)
		return errno = errno == EFAULT ? EFAULT : EIO, -1;
	size_t room = raw->response.len < NSM_RESPONSE_MAX_SIZE ? raw->response.len : NSM_RESPONSE_MAX_SIZE;
	do
		length = recv(fd, (void *)(uintptr_t)raw->response.addr, room, MSG_TRUNC);
	while (length < 0 && errno == EINTR);
	if (length <= 0) /* 0: the simulator hung up; no answer is empty */
		return errno = length < 0 && errno == EFAULT ? EFAULT : EIO, -1;
	return length;
}

/* ioctl(NSM_IOCTL_RAW): one request and its answer. */
static int ask(struct nsm_raw *user)
{
	int saved = errno;
	struct nsm_raw raw;
	if (checked_copy(&raw, user, sizeof raw) != 0)
		return -1;
	if (raw.request.len > NSM_REQUEST_MAX_SIZE)
		return errno = EMSGSIZE, -1;
	if (raw.request.len == 0)
		return errno = EINVAL, -1;
	int fd = dial(NSM, SOCK_CLOEXEC);
	if (fd < 0)
		return errno = EIO, -1;
	ssize_t length = exchange(fd, &raw);
	int reason = errno;
	close(fd);
	if (length < 0)
		return errno = reason, -1;
	/* as the driver: the length of what was copied, which does not tell that an answer was cut */
	uint64_t written = (uint64_t)length < raw.response.len ? (uint64_t)length : raw.response.len;
	if (checked_copy(&user->response.len, &written, sizeof written) != 0)
		return -1;
	errno = saved;
	return 0;
}

int ioctl(int fd, ioctl_command command, ...)
{
	NEXT(int, ioctl, int, ioctl_command, ...);
	va_list rest;
	va_start(rest, command);
	void *argument = va_arg(rest, void *);
	va_end(rest);
	if (!is_of(NSM, fd))
		return next_ioctl(fd, command, argument);
	switch ((unsigned int)command) {
	case NSM_IOCTL_RAW:
		return ask(argument);
	case FIOCLEX: /* these the kernel answers itself, for any file */
	case FIONCLEX:
	case FIONBIO:
	case FIOASYNC:
		return next_ioctl(fd, command, argument);
	case TCGETS:
		return errno = ENOTTY, -1;
	default:
		return errno = EINVAL, -1;
	}
}

/* The mode of an open; it is there only when the flags say so. */
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
	enum device device = device_of(path);
	return device ? open_device(device, flags) : next_open(path, flags, mode);
}
ALIAS(open64, open);

int openat(int folder, const char *path, int flags, ...)
{
	NEXT(int, openat, int, const char *, int, ...);
	mode_t mode = 0;
	MODE_OF(flags, mode);
	enum device device = device_of(path);
	return device ? open_device(device, flags) : next_openat(folder, path, flags, mode);
}
ALIAS(openat64, openat);

/* What open and openat become in programs built with _FORTIFY_SOURCE. */
int __open_2(const char *path, int flags)
{
	NEXT(int, __open_2, const char *, int);
	enum device device = device_of(path);
	return device ? open_device(device, flags) : next___open_2(path, flags);
}
ALIAS(__open64_2, __open_2);

int __openat_2(int folder, const char *path, int flags)
{
	NEXT(int, __openat_2, int, const char *, int);
	enum device device = device_of(path);
	return device ? open_device(device, flags) : next___openat_2(folder, path, flags);
}
ALIAS(__openat64_2, __openat_2);

static int access_device(int mode)
{
	return mode & X_OK ? (errno = EACCES, -1) : 0;
}

int access(const char *path, int mode)
{
	NEXT(int, access, const char *, int);
	return device_of(path) ? access_device(mode) : next_access(path, mode);
}

int faccessat(int folder, const char *path, int mode, int flags)
{
	NEXT(int, faccessat, int, const char *, int, int);
	return device_of(path) ? access_device(mode) : next_faccessat(folder, path, mode, flags);
}

int euidaccess(const char *path, int mode)
{
	NEXT(int, euidaccess, const char *, int);
	return device_of(path) ? access_device(mode) : next_euidaccess(path, mode);
}
ALIAS(eaccess, euidaccess);

/* Turns what was found out about another character device into one of these. */
static int likeness(enum device device, int result, struct stat *status)
{
	if (result == 0) {
		status->st_mode = device == TPM ? TPM_MODE : DEVICE_MODE;
		status->st_rdev = device == TPM ? makedev(TPM_MAJOR, 0) : makedev(DEVICE_MAJOR, DEVICE_MINOR);
	}
	return result;
}

int stat(const char *restrict path, struct stat *restrict status)
{
	NEXT(int, stat, const char *, struct stat *);
	enum device device = device_of(path);
	return device ? likeness(device, next_stat(LIKENESS, status), status) : next_stat(path, status);
}
ALIAS(stat64, stat);

int lstat(const char *restrict path, struct stat *restrict status)
{
	NEXT(int, lstat, const char *, struct stat *);
	enum device device = device_of(path);
	return device ? likeness(device, next_lstat(LIKENESS, status), status) : next_lstat(path, status);
}
ALIAS(lstat64, lstat);

int fstatat(int folder, const char *restrict path, struct stat *restrict status, int flags)
{
	NEXT(int, fstatat, int, const char *, struct stat *, int);
	enum device device = device_of(path);
	return device ? likeness(device, next_fstatat(folder, LIKENESS, status, flags), status)
			       : next_fstatat(folder, path, status, flags);
}
ALIAS(fstatat64, fstatat);

int fstat(int fd, struct stat *status)
{
	NEXT(int, fstat, int, struct stat *);
	int result = next_fstat(fd, status);
	if (result == 0 && S_ISSOCK(status->st_mode) && is_of(NSM, fd))
		return stat(DEVICE, status);
	if (result == 0 && S_ISSOCK(status->st_mode) && is_of(TPM, fd))
		return stat("/dev/tpmrm0", status);
	return result;
}
ALIAS(fstat64, fstat);

/* What the stat family was in programs built against a glibc older than 2.33. */
int __xstat(int version, const char *path, struct stat *status)
{
	NEXT(int, __xstat, int, const char *, struct stat *);
	enum device device = device_of(path);
	return device ? likeness(device, next___xstat(version, LIKENESS, status), status)
			       : next___xstat(version, path, status);
}
ALIAS(__xstat64, __xstat);

int __lxstat(int version, const char *path, struct stat *status)
{
	NEXT(int, __lxstat, int, const char *, struct stat *);
	enum device device = device_of(path);
	return device ? likeness(device, next___lxstat(version, LIKENESS, status), status)
			       : next___lxstat(version, path, status);
}
ALIAS(__lxstat64, __lxstat);

int __fxstatat(int version, int folder, const char *path, struct stat *status, int flags)
{
	NEXT(int, __fxstatat, int, int, const char *, struct stat *, int);
	enum device device = device_of(path);
	return device ? likeness(device, next___fxstatat(version, folder, LIKENESS, status, flags), status)
			       : next___fxstatat(version, folder, path, status, flags);
}
ALIAS(__fxstatat64, __fxstatat);

int __fxstat(int version, int fd, struct stat *status)
{
	NEXT(int, __fxstat, int, int, struct stat *);
	int result = next___fxstat(version, fd, status);
	if (result == 0 && S_ISSOCK(status->st_mode) && is_of(NSM, fd))
		return __xstat(version, DEVICE, status);
	if (result == 0 && S_ISSOCK(status->st_mode) && is_of(TPM, fd))
		return __xstat(version, "/dev/tpmrm0", status);
	return result;
}
ALIAS(__fxstat64, __fxstat);

#ifdef STATX_TYPE /* not in every C library */
int statx(int folder, const char *restrict path, int flags, unsigned int mask, struct statx *restrict status)
{
	NEXT(int, statx, int, const char *, int, unsigned int, struct statx *);
	enum device device = device_of(path);
	if (!device)
		return next_statx(folder, path, flags, mask, status);
	int result = next_statx(folder, LIKENESS, flags, mask, status);
	if (result == 0) {
		status->stx_mode = device == TPM ? TPM_MODE : DEVICE_MODE;
		status->stx_rdev_major = device == TPM ? TPM_MAJOR : DEVICE_MAJOR;
		status->stx_rdev_minor = device == TPM ? 0 : DEVICE_MINOR;
	}
	return result;
}
#endif

/* A socket cannot be sought in; some programs try that on the device before they use it (Python's open in "r+"). */
off_t lseek(int fd, off_t offset, int whence)
{
	NEXT(off_t, lseek, int, off_t, int);
	int saved = errno;
	off_t result = next_lseek(fd, offset, whence);
	if (result < 0 && errno == ESPIPE && (is_of(NSM, fd) || is_of(TPM, fd))) {
		errno = saved;
		return 0;
	}
	return result;
}
ALIAS(lseek64, lseek);
