/* A VMM's side of hcd's doorbell socket, complete: docs/doorbells.md is the specification.
 *
 *     hcd device echo --socket-path=/tmp/echo.sock --ports=0x510 --gpas=0xd0000
 *     cc -O2 -Wall -pthread -o doorbell_vmm docs/examples/doorbell_vmm.c && ./doorbell_vmm /tmp/echo.sock
 *
 * It makes a virtual machine of one vCPU in real mode, registers what hcd's table names, lets the guest ring one port
 * and one memory doorbell of 4 bytes, and ends when the guest has taken the interrupt that answers each.
 *
 * Who wants this in a real VMM takes the part up to "the virtual machine". A VMM that is to survive a restart of hcd
 * keeps the descriptors when the connection ends, and offers them in HOLD messages behind the next HELLO.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/kvm.h>
#include <pthread.h>
#include <semaphore.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

/* -- the protocol: little-endian, as this machine is */

enum { HELLO = 1, STATUS = 5, CLOCK = 6, ERROR = 0x40, WELCOME = 0x81, DOORBELLS, INTERRUPTS, MEMORY, REMOVE, END };
enum { CAN_PIO = 1, CAN_MMIO = 2, CAN_MMIO_ANY = 4, CAN_PIO_ANY = 8, CAN_HYPERV = 16, CAN_XEN = 32, CAN_IRQFD = 64,
       CAN_MEMORY = 128 };
enum { AT_PORT = 1, AT_ADDRESS = 2, AT_HYPERV = 3, AT_XEN = 4 };
enum { KIND_DOORBELL = 1, KIND_INTERRUPT = 2, KIND_MEMORY = 3 };
enum { HAS_DATAMATCH = 1, IS_HELD = 2, HAS_STAMP = 4 };
enum { MAX_ITEMS = 253 };

struct header { uint16_t type, count; uint32_t size; };
struct hello { struct header h; char magic[8]; uint16_t lowest, highest; uint32_t can, held, zero; char name[32]; };
struct welcome { struct header h; uint16_t version, zero; uint32_t doorbells, interrupts, memory; char device[32]; };
struct clock_is { struct header h; uint32_t tsc_khz, zero; int64_t tsc_offset; };
struct error { struct header h; uint32_t code, zero; char text[120]; };
struct doorbell { uint32_t id; uint8_t place, width; uint16_t flags; uint64_t address, datamatch;
                  uint32_t stamp, zero; char name[32]; };
struct interrupt { uint32_t id; uint16_t zero, flags; char name[32]; };
struct memory { uint32_t id; uint16_t zero, flags; uint64_t size, wanted; };
struct reference { uint32_t id; uint16_t kind, zero; };
struct status { uint32_t id; int32_t error; uint64_t value; };
_Static_assert(sizeof(struct hello) == 64 && sizeof(struct welcome) == 56 && sizeof(struct clock_is) == 24 &&
               sizeof(struct error) == 136 && sizeof(struct doorbell) == 64 && sizeof(struct interrupt) == 40 &&
               sizeof(struct memory) == 24 && sizeof(struct reference) == 8 && sizeof(struct status) == 16,
               "the layouts have no padding");

union packet {
    struct header h;
    struct hello hello;
    struct welcome welcome;
    struct clock_is clock;
    struct error error;
    struct { struct header h; struct doorbell items[MAX_ITEMS]; } doorbells;
    struct { struct header h; struct interrupt items[MAX_ITEMS]; } interrupts;
    struct { struct header h; struct memory items[MAX_ITEMS]; } memory;
    struct { struct header h; struct reference items[MAX_ITEMS]; } references;
    struct { struct header h; struct status items[MAX_ITEMS]; } answer;
};

struct vmm {
    int kvm, vm, vcpu, sock;
    sem_t complete;                 /* the table is */
    uint32_t next_gsi;
    struct doorbell port, address;  /* what the guest is going to ring */
    char lines[8][32];              /* the interrupts by GSI: their names */
};

/* What was registered, so that it can be undone. */
struct registered {
    struct registered *next;
    struct reference what;
    int fd;
    struct kvm_ioeventfd io;
    struct kvm_irqfd irq;
    struct kvm_hyperv_eventfd hyperv;
    struct kvm_userspace_memory_region slot;
} *all;

static void die(const char *what)
{
    perror(what);
    exit(1);
}

static int attempt(int fd, unsigned long request, void *argument)
{
    return ioctl(fd, request, argument) < 0 ? errno : 0;
}

static struct registered *remember(int kind, uint32_t id, int fd)
{
    struct registered *r = calloc(1, sizeof *r);
    if (!r)
        die("calloc");
    r->what = (struct reference){ .id = id, .kind = kind };
    r->fd = fd;
    r->next = all;
    return all = r;
}

static int add_doorbell(struct vmm *v, const struct doorbell *d, int fd)
{
    struct registered *r = remember(KIND_DOORBELL, d->id, fd);

    if (d->width == 4 && !v->port.id && d->place == AT_PORT)
        v->port = *d;
    if (d->width == 4 && !v->address.id && d->place == AT_ADDRESS)
        v->address = *d;
    if (d->place == AT_HYPERV) {
        r->hyperv = (struct kvm_hyperv_eventfd){ .conn_id = d->address, .fd = fd };
        return attempt(v->vm, KVM_HYPERV_EVENTFD, &r->hyperv);
    }
    if (d->place != AT_PORT && d->place != AT_ADDRESS)
        return EOPNOTSUPP;
    r->io = (struct kvm_ioeventfd){ .addr = d->address, .len = d->width, .fd = fd, .datamatch = d->datamatch };
    r->io.flags = (d->place == AT_PORT ? KVM_IOEVENTFD_FLAG_PIO : 0) |
                  (d->flags & HAS_DATAMATCH ? KVM_IOEVENTFD_FLAG_DATAMATCH : 0);
    return attempt(v->vm, KVM_IOEVENTFD, &r->io);
}

static int add_interrupt(struct vmm *v, const struct interrupt *i, int fd, uint64_t *gsi)
{
    struct registered *r = remember(KIND_INTERRUPT, i->id, fd);

    if (v->next_gsi > 7)
        return ENOSPC;              /* this guest knows the first interrupt controller only */
    *gsi = v->next_gsi++;
    memcpy(v->lines[*gsi], i->name, sizeof i->name);
    r->irq = (struct kvm_irqfd){ .fd = fd, .gsi = *gsi };
    return attempt(v->vm, KVM_IRQFD, &r->irq);
}

static int add_memory(struct vmm *v, const struct memory *m, int fd, uint64_t *where)
{
    struct registered *r = remember(KIND_MEMORY, m->id, fd);
    void *p = mmap(NULL, m->size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);

    if (p == MAP_FAILED)
        return errno;
    *where = m->wanted ? m->wanted : 0x80000000;
    r->slot = (struct kvm_userspace_memory_region){ .slot = 1, .guest_phys_addr = *where, .memory_size = m->size,
                                                    .userspace_addr = (uintptr_t)p };
    return attempt(v->vm, KVM_SET_USER_MEMORY_REGION, &r->slot);
}

static void undo(struct vmm *v, struct registered *r)
{
    if (r->io.fd) {
        r->io.flags |= KVM_IOEVENTFD_FLAG_DEASSIGN;
        ioctl(v->vm, KVM_IOEVENTFD, &r->io);
    }
    if (r->hyperv.fd) {
        r->hyperv.flags = KVM_HYPERV_EVENTFD_DEASSIGN;
        ioctl(v->vm, KVM_HYPERV_EVENTFD, &r->hyperv);
    }
    if (r->irq.fd) {
        r->irq.flags = KVM_IRQFD_FLAG_DEASSIGN;
        ioctl(v->vm, KVM_IRQFD, &r->irq);
    }
    if (r->slot.memory_size) {
        size_t size = r->slot.memory_size;
        r->slot.memory_size = 0;
        ioctl(v->vm, KVM_SET_USER_MEMORY_REGION, &r->slot);
        munmap((void *)(uintptr_t)r->slot.userspace_addr, size);
    }
    close(r->fd);
    free(r);
}

static int remove_item(struct vmm *v, struct reference what)
{
    for (struct registered **p = &all; *p; p = &(*p)->next)
        if ((*p)->what.id == what.id && (*p)->what.kind == what.kind) {
            struct registered *r = *p;
            *p = r->next;
            undo(v, r);
            return 0;
        }
    return ENOENT;
}

/* One packet and its descriptors; the number of bytes, 0 when hcd hung up. */
static size_t receive(int sock, union packet *p, int *fds, int *n_fds)
{
    char control[CMSG_SPACE(MAX_ITEMS * sizeof(int))];
    struct iovec iov = { p, sizeof *p };
    struct msghdr m = { .msg_iov = &iov, .msg_iovlen = 1, .msg_control = control, .msg_controllen = sizeof control };
    ssize_t n = recvmsg(sock, &m, MSG_CMSG_CLOEXEC);

    *n_fds = 0;
    if (n < 0 && errno != ECONNRESET)
        die("recvmsg");
    if (n <= 0)
        return 0;
    for (struct cmsghdr *c = CMSG_FIRSTHDR(&m); c; c = CMSG_NXTHDR(&m, c))
        if (c->cmsg_level == SOL_SOCKET && c->cmsg_type == SCM_RIGHTS) {
            *n_fds = (c->cmsg_len - CMSG_LEN(0)) / sizeof(int);
            memcpy(fds, CMSG_DATA(c), *n_fds * sizeof(int));
        }
    if (m.msg_flags & (MSG_TRUNC | MSG_CTRUNC) || (size_t)n < sizeof p->h || p->h.size != n) {
        fprintf(stderr, "hcd sent something that is not of this protocol\n");
        exit(1);
    }
    return n;
}

static void send_packet(int sock, void *p, uint32_t size)
{
    ((struct header *)p)->size = size;
    if (send(sock, p, size, MSG_NOSIGNAL) < 0)
        perror("send");
}

/* Every table message and every removal is answered at once, item by item, in its order. */
static void answer(struct vmm *v, const union packet *p, const int *fds)
{
    static union packet a;
    const struct doorbell *d = p->doorbells.items;
    const struct interrupt *i = p->interrupts.items;
    const struct memory *m = p->memory.items;

    for (int k = 0; k < p->h.count; k++) {
        struct status *s = &a.answer.items[k];
        memset(s, 0, sizeof *s);
        switch (p->h.type) {
        case DOORBELLS:
            s->id = d[k].id;
            s->error = add_doorbell(v, &d[k], fds[k]);
            printf("doorbell %s: %s\n", d[k].name, s->error ? strerror(s->error) : "registered");
            break;
        case INTERRUPTS:
            s->id = i[k].id;
            s->error = add_interrupt(v, &i[k], fds[k], &s->value);
            printf("interrupt %s: %s\n", i[k].name, s->error ? strerror(s->error) : "registered");
            break;
        case MEMORY:
            s->id = m[k].id;
            s->error = add_memory(v, &m[k], fds[k], &s->value);
            printf("memory: %s\n", s->error ? strerror(s->error) : "mapped");
            break;
        case REMOVE:
            s->id = p->references.items[k].id;
            s->error = remove_item(v, p->references.items[k]);
            break;
        }
    }
    a.h = (struct header){ .type = STATUS, .count = p->h.count };
    send_packet(v->sock, &a, sizeof a.h + p->h.count * sizeof(struct status));
}

/* The connection, for as long as hcd is there. */
static void *control(void *argument)
{
    static union packet p;
    int fds[MAX_ITEMS], n_fds;
    struct vmm *v = argument;

    while (receive(v->sock, &p, fds, &n_fds))
        switch (p.h.type) {
        case WELCOME:
            printf("device %s: %u doorbells, %u interrupts\n", p.welcome.device, p.welcome.doorbells,
                   p.welcome.interrupts);
            break;
        case DOORBELLS:
        case INTERRUPTS:
        case MEMORY:
            if (n_fds != p.h.count) {   /* we held nothing, so every item brings its descriptor */
                fprintf(stderr, "descriptors are missing\n");
                exit(1);
            }
            /* fall through */
        case REMOVE:
            answer(v, &p, fds);
            break;
        case END:
            sem_post(&v->complete);
            break;
        case ERROR:
            fprintf(stderr, "hcd: %s\n", p.error.text);
            exit(1);
        }
    fprintf(stderr, "hcd is gone\n");
    while (all)
        remove_item(v, all->what);
    exit(1);
}

static uint32_t what_the_kernel_can(struct vmm *v)
{
    uint32_t can = CAN_MEMORY;
    if (ioctl(v->kvm, KVM_CHECK_EXTENSION, KVM_CAP_IOEVENTFD) > 0)
        can |= CAN_PIO | CAN_MMIO;
    if (ioctl(v->kvm, KVM_CHECK_EXTENSION, KVM_CAP_IOEVENTFD_NO_LENGTH) > 0)
        can |= CAN_MMIO_ANY;
    if (ioctl(v->kvm, KVM_CHECK_EXTENSION, KVM_CAP_IOEVENTFD_ANY_LENGTH) > 0)
        can |= CAN_PIO_ANY;
    if (ioctl(v->kvm, KVM_CHECK_EXTENSION, KVM_CAP_HYPERV_EVENTFD) > 0)
        can |= CAN_HYPERV;
    if (ioctl(v->kvm, KVM_CHECK_EXTENSION, KVM_CAP_IRQFD) > 0)
        can |= CAN_IRQFD;
    return can;
}

static void connect_to(struct vmm *v, const char *path)
{
    struct sockaddr_un to = { .sun_family = AF_UNIX };
    struct hello hello = { .h.type = HELLO, .magic = "hcd-bell", .lowest = 1, .highest = 1,
                           .can = what_the_kernel_can(v), .name = "example" };

    strncpy(to.sun_path, path, sizeof to.sun_path - 1);
    v->sock = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);
    if (v->sock < 0 || connect(v->sock, (struct sockaddr *)&to, sizeof to) < 0)
        die(path);
    send_packet(v->sock, &hello, sizeof hello);
}

/* Lets hcd read the stamps of the guest: guest TSC = host TSC + offset. */
static void tell_clock(struct vmm *v)
{
    struct clock_is c = { .h.type = CLOCK };
    struct kvm_device_attr offset = { .group = 0 /* KVM_VCPU_TSC_CTRL */, .attr = 0 /* KVM_VCPU_TSC_OFFSET */,
                                      .addr = (uintptr_t)&c.tsc_offset };
    int khz = ioctl(v->vcpu, KVM_GET_TSC_KHZ, 0);

    if (khz <= 0 || ioctl(v->vcpu, KVM_GET_DEVICE_ATTR, &offset) < 0)
        return;                     /* then its rings are counted and not timed */
    c.tsc_khz = khz;
    send_packet(v->sock, &c, sizeof c);
}

/* -- the virtual machine: 64 KiB of memory, real mode, the interrupt controllers of a PC in the kernel */

enum { CODE = 0x1000, STACK = 0x8000, SIZE = 0x10000, VECTOR = 0x20, REPORT = 0xe0 };

static uint8_t *emit(uint8_t *p, const void *code, size_t n)
{
    memcpy(p, code, n);
    return p + n;
}

#define EMIT(...) (p = emit(p, (const uint8_t[]){ __VA_ARGS__ }, sizeof((const uint8_t[]){ __VA_ARGS__ })))

static uint8_t *load_eax(uint8_t *p, uint32_t value)
{
    EMIT(0x66, 0xb8, value, value >> 8, value >> 16, value >> 24);      /* mov eax, value */
    return p;
}

static void write_guest(struct vmm *v, uint8_t *memory)
{
    uint8_t *p = memory + CODE;

    /* The first interrupt controller: vectors from 0x20, nothing masked. */
    EMIT(0xb0, 0x11, 0xe6, 0x20);                       /* mov al, 0x11; out 0x20, al */
    EMIT(0xb0, VECTOR, 0xe6, 0x21);
    EMIT(0xb0, 0x04, 0xe6, 0x21);
    EMIT(0xb0, 0x01, 0xe6, 0x21);
    EMIT(0xb0, 0x00, 0xe6, 0x21);
    if (v->port.id) {
        p = load_eax(p, v->port.datamatch);
        EMIT(0xba, v->port.address, v->port.address >> 8);              /* mov dx, port */
        EMIT(0x66, 0xef);                                               /* out dx, eax: rings */
    }
    if (v->address.id) {
        p = load_eax(p, v->address.datamatch);
        EMIT(0x66, 0xa3, 0, 0);                                         /* mov [0], eax: rings; ds begins there */
    }
    EMIT(0xfb, 0xeb, 0xfe);                                             /* sti; jmp to itself */
    for (int irq = 0; irq < 8; irq++) {
        uint16_t vector[2] = { p - memory, 0 };
        memcpy(memory + 4 * (VECTOR + irq), vector, sizeof vector);
        EMIT(0xb0, irq, 0xe6, REPORT);                                  /* mov al, irq; out REPORT, al */
        EMIT(0xb0, 0x20, 0xe6, 0x20);                                   /* end of interrupt */
        EMIT(0xcf);                                                     /* iret */
    }
}

static void make_machine(struct vmm *v)
{
    v->kvm = open("/dev/kvm", O_RDWR | O_CLOEXEC);
    if (v->kvm < 0)
        die("/dev/kvm");
    v->vm = ioctl(v->kvm, KVM_CREATE_VM, 0);
    if (v->vm < 0)
        die("KVM_CREATE_VM");
    if (ioctl(v->vm, KVM_SET_TSS_ADDR, 0xfffbd000ul) < 0 || ioctl(v->vm, KVM_CREATE_IRQCHIP, 0) < 0)
        die("KVM_CREATE_IRQCHIP");
    v->vcpu = ioctl(v->vm, KVM_CREATE_VCPU, 0);
    if (v->vcpu < 0)
        die("KVM_CREATE_VCPU");
    v->next_gsi = 3;
}

static void set_registers(struct vmm *v)
{
    struct kvm_sregs s;
    struct kvm_regs r = { .rip = CODE, .rsp = STACK, .rflags = 2 };

    if (ioctl(v->vcpu, KVM_GET_SREGS, &s) < 0)
        die("KVM_GET_SREGS");
    s.cs.base = s.cs.selector = s.ss.base = s.ss.selector = 0;
    s.ds.base = v->address.address;
    s.ds.selector = v->address.address >> 4;
    if (ioctl(v->vcpu, KVM_SET_SREGS, &s) < 0 || ioctl(v->vcpu, KVM_SET_REGS, &r) < 0)
        die("KVM_SET_SREGS");
}

/* The interrupt that answers a doorbell: the device echo gives it the same name. A bit for its GSI. */
static uint32_t answering(const struct vmm *v, const struct doorbell *d)
{
    for (int gsi = 0; d->id && gsi < 8; gsi++)
        if (!strncmp(v->lines[gsi], d->name, sizeof d->name))
            return 1u << gsi;
    return 0;
}

/* Run until the guest has reported every interrupt in ``expected``. */
static void run(struct vmm *v, uint32_t expected)
{
    size_t size = ioctl(v->kvm, KVM_GET_VCPU_MMAP_SIZE, 0);
    struct kvm_run *run = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, v->vcpu, 0);

    if (run == MAP_FAILED)
        die("mmap");
    while (expected) {
        if (ioctl(v->vcpu, KVM_RUN, 0) < 0 && errno != EINTR)
            die("KVM_RUN");
        if (run->exit_reason != KVM_EXIT_IO || run->io.port != REPORT) {
            fprintf(stderr, "the guest stopped: exit %u\n", run->exit_reason);
            exit(1);
        }
        uint8_t irq = *((uint8_t *)run + run->io.data_offset);
        printf("the guest took interrupt %u\n", irq);
        expected &= ~(1u << irq);
    }
}

int main(int argc, char **argv)
{
    static struct vmm v;
    struct kvm_userspace_memory_region slot = { .slot = 0, .memory_size = SIZE };
    pthread_t thread;
    uint8_t *memory = mmap(NULL, SIZE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);

    if (argc != 2 || memory == MAP_FAILED) {
        fprintf(stderr, "usage: doorbell_vmm SOCKET\n");
        return 2;
    }
    alarm(20);                      /* whatever happens, this ends */
    setvbuf(stdout, NULL, _IOLBF, 0);
    sem_init(&v.complete, 0, 0);
    make_machine(&v);
    connect_to(&v, argv[1]);
    tell_clock(&v);
    if (pthread_create(&thread, NULL, control, &v))
        die("pthread_create");
    sem_wait(&v.complete);

    slot.userspace_addr = (uintptr_t)memory;
    if (ioctl(v.vm, KVM_SET_USER_MEMORY_REGION, &slot) < 0)
        die("KVM_SET_USER_MEMORY_REGION");
    write_guest(&v, memory);
    set_registers(&v);
    run(&v, answering(&v, &v.port) | answering(&v, &v.address));
    printf("every interrupt came\n");
    return 0;
}
