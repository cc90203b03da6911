/*
 * The first process of an enclave, in its first ramdisk: kernel modules, the heartbeat that the parent waits for, and
 * then the container of the second ramdisk.
 *
 * What nitro-cli lays out is what is expected here: the root of the container in /rootfs, what to start in /cmd and its
 * environment in /env, a word a line. Modules lie in /modules and are loaded in the order of their names; to our own,
 * virtio_mmio_devices, go the devices that the kernel's command line has for virtio_mmio. Everything is said on the console, which a production enclave does not have; whatever fails before the container runs ends the
 * enclave.
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <sys/wait.h>
#include <unistd.h>

#include <linux/vm_sockets.h>

enum { PARENT = 3, HEARTBEAT_PORT = 9000, HEARTBEAT = 0xb7, PATIENCE = 30, WORDS_MAX = 1024, TEXT_MAX = 1 << 18, COMMAND_LINE_MAX = 1 << 13 };

static void end(void) {
    sync();
    reboot(RB_AUTOBOOT); /* with reboot=k the hypervisor ends the enclave */
    for (;;)
        pause();
}

static void say(const char *form, ...) {
    va_list values;
    va_start(values, form);
    fputs("init: ", stderr);
    vfprintf(stderr, form, values);
    fputc('\n', stderr);
    va_end(values);
}

static void fail(const char *what, const char *name) {
    say("error: %s %s: %s", what, name, strerror(errno));
    end();
}

static void mount_on(const char *type, const char *target, unsigned long flags, const char *data) {
    mkdir(target, 0755);
    if (mount(type, target, type, flags, data) && errno != EBUSY) /* devtmpfs may be mounted by the kernel */
        fail("mount", target);
}

/* All of a file, as a string. */
static char *contents(const char *path, char *text, size_t room) {
    int file = open(path, O_RDONLY | O_CLOEXEC);
    size_t size = 0;
    ssize_t part;
    if (file < 0)
        fail("open", path);
    while ((part = read(file, text + size, room - size)) > 0)
        size += part;
    if (part < 0 || size == room) {
        errno = part < 0 ? errno : EFBIG;
        fail("read", path);
    }
    close(file);
    text[size] = '\0';
    return text;
}

/* What the kernel's command line says to the driver virtio_mmio, as parameters of a module. */
static const char *devices(void) {
    static const char driver[] = "virtio_mmio.";
    static char text[COMMAND_LINE_MAX], found[COMMAND_LINE_MAX];
    char *end = found;
    contents("/proc/cmdline", text, sizeof text);
    for (char *word = strtok(text, " \n"); word; word = strtok(NULL, " \n"))
        if (!strncmp(word, driver, sizeof driver - 1))
            end += sprintf(end, "%s ", word + sizeof driver - 1); /* shorter than where it came from */
    return found;
}

static void load(const char *name) {
    char path[300];
    snprintf(path, sizeof path, "/modules/%s", name);
    int file = open(path, O_RDONLY | O_CLOEXEC);
    if (file < 0)
        fail("open", path);
    const char *parameters = strstr(name, "virtio_mmio_devices") ? devices() : "";
    if (syscall(SYS_finit_module, file, parameters, 0) && errno != EEXIST)
        fail("load", path);
    close(file);
}

static int is_module(const struct dirent *entry) {
    return entry->d_name[0] != '.';
}

static void load_modules(void) {
    struct dirent **found;
    int count = scandir("/modules", &found, is_module, alphasort);
    for (int index = 0; index < count; index++)
        load(found[index]->d_name);
}

/* The parent's nitro-cli takes an enclave for started when it has got this byte and sent it back. */
static void tell_parent(void) {
    struct sockaddr_vm parent = {.svm_family = AF_VSOCK, .svm_cid = PARENT, .svm_port = HEARTBEAT_PORT};
    struct timeval patience = {.tv_sec = PATIENCE};
    uint8_t byte = HEARTBEAT;
    int wire = socket(AF_VSOCK, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (wire < 0)
        fail("socket", "vsock");
    setsockopt(wire, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof patience);
    if (connect(wire, (struct sockaddr *)&parent, sizeof parent))
        fail("connect to", "the parent");
    if (write(wire, &byte, 1) != 1 || read(wire, &byte, 1) != 1 || byte != HEARTBEAT)
        fail("heartbeat of", "the parent");
    close(wire);
}

/* The lines of a file, as the words of argv or of the environment. */
static char **words_of(const char *path) {
    static char texts[2][TEXT_MAX + 1];
    static char *words[2][WORDS_MAX + 1];
    static int used;
    char **word = words[used], *text = contents(path, texts[used++], sizeof texts[0]);
    int count = 0;
    for (char *line = text, *stop; (stop = strchr(line, '\n')); line = stop + 1) {
        *stop = '\0';
        if (count == WORDS_MAX) {
            errno = E2BIG;
            fail("read", path);
        }
        word[count++] = line;
    }
    word[count] = NULL;
    return word;
}

/* The root of the container becomes that of everything. */
static void enter_container(void) {
    if (mount("/rootfs", "/rootfs", NULL, MS_BIND, NULL) || chdir("/rootfs") || mount(".", "/", NULL, MS_MOVE, NULL) ||
        chroot(".") || chdir("/"))
        fail("enter", "/rootfs");
    mount_on("devtmpfs", "/dev", MS_NOSUID | MS_NOEXEC, "mode=0755");
    mount_on("proc", "/proc", MS_NODEV | MS_NOSUID | MS_NOEXEC, NULL);
    mount_on("sysfs", "/sys", MS_NODEV | MS_NOSUID | MS_NOEXEC, NULL);
    mount_on("devpts", "/dev/pts", MS_NOSUID | MS_NOEXEC, "mode=0620,ptmxmode=0666");
    mount_on("tmpfs", "/dev/shm", MS_NODEV | MS_NOSUID | MS_NOEXEC, "mode=1777");
    mount_on("tmpfs", "/run", MS_NODEV | MS_NOSUID | MS_NOEXEC, "mode=0755");
    mount_on("tmpfs", "/tmp", MS_NODEV | MS_NOSUID | MS_NOEXEC, "mode=1777");
    symlink("/proc/self/fd", "/dev/fd");
    symlink("/proc/self/fd/0", "/dev/stdin");
    symlink("/proc/self/fd/1", "/dev/stdout");
    symlink("/proc/self/fd/2", "/dev/stderr");
}

static pid_t start(char **command, char **environment) {
    pid_t child = fork();
    if (child < 0)
        fail("fork for", command[0]);
    if (child)
        return child;
    setsid();
    clearenv();
    for (char **one = environment; *one; one++)
        putenv(*one);
    if (!getenv("PATH"))
        putenv("PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin");
    execvp(command[0], command);
    say("error: start %s: %s", command[0], strerror(errno));
    _exit(errno == ENOENT ? 127 : 126);
}

int main(void) {
    mount_on("devtmpfs", "/dev", MS_NOSUID | MS_NOEXEC, "mode=0755");
    int console = open("/dev/console", O_RDWR);
    for (int target = 0; console >= 0 && target < 3; target++)
        dup2(console, target);
    mount_on("proc", "/proc", 0, NULL);
    load_modules();
    tell_parent();
    char **environment = words_of("/env"), **command = words_of("/cmd");
    if (!command[0]) {
        errno = ENOENT;
        fail("start what is in", "/cmd");
    }
    enter_container();
    pid_t child = start(command, environment), gone;
    int status = 0;
    while ((gone = wait(&status)) != child) /* the parent of every orphan */
        if (gone < 0 && errno != EINTR)
            break;
    say("%s ended with status %d", command[0], WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status));
    end();
}
