// Plays a VMM that its guest has taken over: one attempt a run, `taken_over ATTEMPT [ARGUMENT…]`.
// Exit status 0: the attempt worked. 10: it was refused (why is on standard error). A signal: it was fatal.
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/ptrace.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <unistd.h>

static char secret[] = "the memory of a neighbour";

static int refused(const char *what) {
    fprintf(stderr, "%s: %s\n", what, strerror(errno));
    return 10;
}

static int check(long result, const char *what) { return result < 0 ? refused(what) : 0; }

static int read_path(const char *path) {
    char byte;
    int fd = open(path, O_RDONLY);
    return fd < 0 ? refused(path) : read(fd, &byte, 1) == 1 ? 0 : refused("read");
}

static int write_path(const char *path) {
    int fd = open(path, O_WRONLY);
    return check(fd, path);
}

static int create_path(const char *path) {
    int fd = open(path, O_WRONLY | O_CREAT | O_EXCL, 0600);
    return fd < 0 ? refused(path) : check(unlink(path), "unlink");
}

static int list_processes(void) {
    DIR *directory = opendir("/proc");
    if (!directory) return refused("/proc");
    int others = 0;
    for (struct dirent *entry; (entry = readdir(directory));)
        if (atoi(entry->d_name) > 0 && atoi(entry->d_name) != getpid()) others++;
    fprintf(stderr, "%d other processes\n", others);
    return others ? 0 : 10;
}

static int read_memory_file(const char *pid, const char *address) {
    char path[64], found[sizeof secret];
    snprintf(path, sizeof path, "/proc/%s/mem", pid);
    int fd = open(path, O_RDONLY);
    if (fd < 0) return refused(path);
    if (pread(fd, found, sizeof found, strtoul(address, 0, 16)) != sizeof found) return refused("pread");
    return strcmp(found, secret) ? 10 : 0;
}

static int read_memory_call(const char *pid, const char *address) {
    char found[sizeof secret];
    struct iovec here = {found, sizeof found}, there = {(void *)strtoul(address, 0, 16), sizeof found};
    if (process_vm_readv(atoi(pid), &here, 1, &there, 1, 0) < 0) return refused("process_vm_readv");
    return strcmp(found, secret) ? 10 : 0;
}

static int trace(const char *pid) {
    if (ptrace(PTRACE_ATTACH, atoi(pid), 0, 0) < 0) return refused("ptrace");
    waitpid(atoi(pid), 0, __WALL);
    return check(ptrace(PTRACE_DETACH, atoi(pid), 0, 0), "detach");
}

static int take_descriptor(const char *pid) {
    long pidfd = syscall(SYS_pidfd_open, atoi(pid), 0);
    if (pidfd < 0) errno = 0, pidfd = 0;
    return check(syscall(SYS_pidfd_getfd, pidfd, 0, 0), "pidfd_getfd");
}

static int map_writable(int fd) {
    char *page = mmap(0, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (page == MAP_FAILED) return refused("mmap");
    page[0] = 'X';
    return 0;
}

static int protect_writable(int fd) {
    char *page = mmap(0, 4096, PROT_READ, MAP_SHARED, fd, 0);
    if (page == MAP_FAILED) return refused("mmap");
    if (mprotect(page, 4096, PROT_READ | PROT_WRITE) < 0) return refused("mprotect");
    page[0] = 'X';
    return 0;
}

static int reopen(int fd) {
    char path[64];
    snprintf(path, sizeof path, "/proc/self/fd/%d", fd);
    int again = open(path, O_RDWR);
    return again < 0 ? refused("open") : check(pwrite(again, "X", 1, 0), "pwrite");
}

static int make_socket(int family, int kind) { return check(socket(family, kind, 0), "socket"); }

static int execute(char *path) {
    char *argv[] = {path, "nothing", 0}, *envp[] = {0};
    execve(path, argv, envp);
    return refused("execve");
}

static int start_process(void) {
    pid_t pid = fork();
    if (pid < 0) return refused("fork");
    if (pid == 0) _exit(0);
    waitpid(pid, 0, 0);
    return 0;
}

static int clone_with(unsigned long flags) {
    long pid = syscall(SYS_clone, flags | SIGCHLD, 0, 0, 0, 0);
    if (pid < 0) return refused("clone");
    if (pid == 0) _exit(0);
    waitpid(pid, 0, 0);
    return 0;
}

static void *rest(void *nothing) {
    pause();
    return nothing;
}

static int start_threads(int wanted) {
    pthread_attr_t small;
    pthread_attr_init(&small);
    pthread_attr_setstacksize(&small, 64 << 10);
    int made = 0;
    for (pthread_t thread; made < wanted && !pthread_create(&thread, &small, rest, 0); made++);
    fprintf(stderr, "%d threads\n", made);
    return made == wanted ? 0 : 10;
}

static int use_memory(long mib) {
    char *memory = mmap(0, mib << 20, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) return refused("mmap");
    for (long offset = 0; offset < mib << 20; offset += 4096) memory[offset] = 1;
    return 0;
}

static int use_descriptors(int wanted) {
    for (int made = 0; made < wanted; made++)
        if (dup(0) < 0) return refused("dup");
    return 0;
}

static int burn(int milliseconds) {
    struct timespec now, start;
    clock_gettime(CLOCK_MONOTONIC, &start);
    do clock_gettime(CLOCK_MONOTONIC, &now);
    while ((now.tv_sec - start.tv_sec) * 1000 + (now.tv_nsec - start.tv_nsec) / 1000000 < milliseconds);
    return 0;
}

static int become_root(void) {
    if (geteuid() == 0 && seteuid(1) < 0) return refused("seteuid");
    return setuid(0) < 0 || seteuid(0) < 0 ? refused("setuid") : geteuid() == 0 ? 0 : 10;
}

static int mount_on(const char *path) {
    if (mount("none", path, "tmpfs", 0, 0) < 0) return refused("mount");
    return check(umount2(path, 0), "umount");
}

static int make_device(const char *path) {
    if (mknod(path, S_IFCHR | 0666, 0x101) < 0) return refused("mknod");
    return check(unlink(path), "unlink");
}

static int join_namespace(void) {
    int fd = open("/proc/self/ns/net", O_RDONLY);
    return check(setns(fd, CLONE_NEWNET), "setns");
}

static int foreign_call(void) {  // getpid of the 32-bit calls
    long pid;
    __asm__ volatile("int $0x80" : "=a"(pid) : "a"(20) : "memory");
    return pid > 0 ? 0 : 10;
}

static int main_of(int argc, char **argv) {
    const char *attempt = argc > 1 ? argv[1] : "";
    char *one = argc > 2 ? argv[2] : "", *two = argc > 3 ? argv[3] : "";
    int fd = atoi(one);
#define IF(name) if (!strcmp(attempt, name))
    IF("") return 0;
    IF("nothing") return 0;
    IF("wait") {
        fprintf(stderr, "%p\n", (void *)secret);
        for (;;) pause();
    }
    IF("read") return read_path(one);
    IF("write") return write_path(one);
    IF("create") return create_path(one);
    IF("chmod") return check(chmod(one, 0777), "chmod");
    IF("processes") return list_processes();
    IF("mem") return read_memory_file(one, two);
    IF("vm_readv") return read_memory_call(one, two);
    IF("ptrace") return trace(one);
    IF("getfd") return take_descriptor(one);
    IF("kill") return check(kill(atoi(one), 0), "kill");
    IF("kill_all") return check(kill(-1, 0), "kill");
    IF("pwrite") return check(pwrite(fd, "X", 1, 0), "pwrite");
    IF("mmap") return map_writable(fd);
    IF("mprotect") return protect_writable(fd);
    IF("ftruncate") return check(ftruncate(fd, 1), "ftruncate");
    IF("punch") return check(fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 0, 4096), "fallocate");
    IF("fchmod") return check(fchmod(fd, 0), "fchmod");
    IF("reopen") return reopen(fd);
    IF("beyond") return check(pwrite(fd, "X", 1, 65l << 20), "pwrite");
    IF("socket") return make_socket(fd, atoi(two));
    IF("exec") return execute(one);
    IF("execveat") return check(syscall(SYS_execveat, -100, one, 0, 0, 0), "execveat");
    IF("fork") return start_process();
    IF("clone") return clone_with(strtoul(one, 0, 16));
    IF("threads") return start_threads(fd);
    IF("memory") return use_memory(fd);
    IF("descriptors") return use_descriptors(fd);
    IF("burn") return burn(fd);
    IF("root") return become_root();
    IF("mount") return mount_on(one);
    IF("mknod") return make_device(one);
    IF("setns") return join_namespace();
    IF("unshare") return check(unshare(strtoul(one, 0, 16)), "unshare");
    IF("chroot") return check(chroot("/"), "chroot");
    IF("prctl") return check(prctl(PR_SET_CHILD_SUBREAPER, 1), "prctl");
    IF("call") return check(syscall(strtoul(one, 0, 0), 0, 0, 0, 0, 0), one);
    IF("i386") return foreign_call();
    fprintf(stderr, "no such attempt: %s\n", attempt);
    return 2;
}

int main(int argc, char **argv) { return main_of(argc, argv); }
