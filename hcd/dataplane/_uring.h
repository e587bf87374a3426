/* One io_uring(7) for the reads and writes of a file that go past the page cache.
 *
 * Theory of operation.
 *
 * - Threads with one system call each serve a disk well while it is the page cache that answers. Past it a request costs
 *   a sleep, and two changes of threads, to a disk that could have had sixty-four at once. The ring takes a batch in one
 *   system call, from the lane's own thread, and that call does not wait for the disk.
 * - The lane's thread alone touches the ring. Completions raise the pool's eventfd, as those of its threads do.
 * - The ring does the common case and nothing else: what does not come back whole (an error, a short transfer, memory
 *   that O_DIRECT does not take as it lies) goes on in a thread from where it got to, and fails there if it has to.
 *   What finds no room in the ring takes the same way. So there is one place that knows of errors.
 * - The kernel holds the guest's pages from the submission on. Memory that is revoked meanwhile is gone from hcd's
 *   address space, and the transfer ends in pages that are nobody's.
 * - A kernel or a sandbox without io_uring: there is no ring, and threads do it all.
 */
#ifndef HCD_URING_H
#define HCD_URING_H

#include <errno.h>
#include <linux/io_uring.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

#define HCD_URING_ENTRIES 128       /* at once with the disk */
#define HCD_URING_EARLY 4           /* that wait for a call of the kernel, see blockfile.pyx */
#define HCD_URING_PIECES 32         /* of a scatter list; a longer one goes to a thread */

typedef struct {
    int fd;
    unsigned queued;                /* prepared, not submitted */
    unsigned with_kernel;           /* submitted, not reaped */
    unsigned *sq_tail, sq_mask;
    unsigned *cq_head, *cq_tail, cq_mask;
    struct io_uring_sqe *sqes;
    struct io_uring_cqe *cqes;
    void *rings;
    size_t rings_size, sqes_size;
    struct iovec iov[HCD_URING_ENTRIES][HCD_URING_PIECES];      /* of what is queued: the kernel copies them */
} hcd_uring;

static inline int hcd_uring_enter(const hcd_uring *u, unsigned submit, unsigned wait)
{
    return (int)syscall(__NR_io_uring_enter, u->fd, submit, wait, wait ? IORING_ENTER_GETEVENTS : 0, NULL, 0);
}

static void hcd_uring_free(hcd_uring *u)
{
    if (u == NULL)
        return;
    if (u->sqes != NULL)
        munmap(u->sqes, u->sqes_size);
    if (u->rings != NULL)
        munmap(u->rings, u->rings_size);
    close(u->fd);
    free(u);
}

static int hcd_uring_map(hcd_uring *u, const struct io_uring_params *p)
{
    size_t sq = p->sq_off.array + p->sq_entries * sizeof(unsigned);
    size_t cq = p->cq_off.cqes + p->cq_entries * sizeof(struct io_uring_cqe);
    u->rings_size = sq > cq ? sq : cq;
    u->sqes_size = p->sq_entries * sizeof(struct io_uring_sqe);
    void *rings = mmap(NULL, u->rings_size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, u->fd, IORING_OFF_SQ_RING);
    if (rings == MAP_FAILED)
        return -1;
    u->rings = rings;
    void *sqes = mmap(NULL, u->sqes_size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, u->fd, IORING_OFF_SQES);
    if (sqes == MAP_FAILED)
        return -1;
    u->sqes = sqes;
    char *at = rings;
    u->sq_tail = (unsigned *)(at + p->sq_off.tail);
    u->sq_mask = *(unsigned *)(at + p->sq_off.ring_mask);
    u->cq_head = (unsigned *)(at + p->cq_off.head);
    u->cq_tail = (unsigned *)(at + p->cq_off.tail);
    u->cq_mask = *(unsigned *)(at + p->cq_off.ring_mask);
    u->cqes = (struct io_uring_cqe *)(at + p->cq_off.cqes);
    unsigned *array = (unsigned *)(at + p->sq_off.array);
    for (unsigned i = 0; i < p->sq_entries; i++)
        array[i] = i;
    return 0;
}

/* NULL where there is none to be had, or not one that takes iovecs at submission. `event_fd` is written for every
 * completion. */
static hcd_uring *hcd_uring_new(int event_fd)
{
    struct io_uring_params p;
    memset(&p, 0, sizeof(p));
    const unsigned wanted = IORING_FEAT_SINGLE_MMAP | IORING_FEAT_NODROP | IORING_FEAT_SUBMIT_STABLE;
    int fd = (int)syscall(__NR_io_uring_setup, HCD_URING_ENTRIES, &p);
    if (fd < 0)
        return NULL;
    hcd_uring *u = calloc(1, sizeof(*u));
    if (u == NULL) {
        close(fd);
        return NULL;
    }
    u->fd = fd;
    if ((p.features & wanted) != wanted || hcd_uring_map(u, &p) != 0 ||
        syscall(__NR_io_uring_register, fd, IORING_REGISTER_EVENTFD, &event_fd, 1) != 0) {
        hcd_uring_free(u);
        return NULL;
    }
    return u;
}

/* Room for one more transfer of at most HCD_URING_PIECES: where its iovecs go, or NULL. */
static inline struct iovec *hcd_uring_room(hcd_uring *u)
{
    if (u->queued + u->with_kernel >= HCD_URING_ENTRIES)
        return NULL;
    return u->iov[u->queued];
}

/* The transfer whose iovecs were just put where hcd_uring_room said. `tag` comes back with its completion. */
static inline void hcd_uring_queue(hcd_uring *u, int fd, int write, int n, uint64_t offset, int flags, void *tag)
{
    unsigned tail = *u->sq_tail;
    struct io_uring_sqe *sqe = &u->sqes[tail & u->sq_mask];
    memset(sqe, 0, sizeof(*sqe));
    sqe->opcode = write ? IORING_OP_WRITEV : IORING_OP_READV;
    sqe->fd = fd;
    sqe->off = offset;
    sqe->addr = (uint64_t)(uintptr_t)u->iov[u->queued];
    sqe->len = (unsigned)n;
    sqe->rw_flags = flags;
    sqe->user_data = (uint64_t)(uintptr_t)tag;
    __atomic_store_n(u->sq_tail, tail + 1, __ATOMIC_RELEASE);
    u->queued++;
}

/* Hands over what is queued. The number that the kernel did not take: they are the last of the queue, and taken back. */
static unsigned hcd_uring_submit(hcd_uring *u)
{
    unsigned left = u->queued;
    while (left) {
        int taken = hcd_uring_enter(u, left, 0);
        if (taken < 0 && errno == EINTR)
            continue;
        if (taken <= 0)
            break;
        left -= (unsigned)taken;
        u->with_kernel += (unsigned)taken;
    }
    u->queued = 0;
    __atomic_store_n(u->sq_tail, *u->sq_tail - left, __ATOMIC_RELEASE);
    return left;
}

/* The next completion: its tag, and in `result` bytes or -errno. NULL without one. */
static inline void *hcd_uring_reap(hcd_uring *u, int *result)
{
    unsigned head = *u->cq_head;
    if (head == __atomic_load_n(u->cq_tail, __ATOMIC_ACQUIRE))
        return NULL;
    const struct io_uring_cqe *cqe = &u->cqes[head & u->cq_mask];
    void *tag = (void *)(uintptr_t)cqe->user_data;
    *result = cqe->res;
    __atomic_store_n(u->cq_head, head + 1, __ATOMIC_RELEASE);
    u->with_kernel--;
    return tag;
}

#endif
