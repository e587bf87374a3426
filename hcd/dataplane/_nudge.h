/* Getting out of a system call that was not meant to block.
 *
 * Kick and call eventfds are made non-blocking, but O_NONBLOCK belongs to the open file, which the front end shares: it
 * can fill an eventfd, take the flag away, and write(2) then sleeps for ever; likewise read(2) of an empty one. For
 * reading there is a flag for one call alone, RWF_NOWAIT (Linux 5.8); for writing to eventfds it is refused. So while a
 * thread signals eventfds, a timer of its own sends it a signal every NUDGE_MS, whose handler does nothing: a call that
 * sleeps ends with EINTR, one that does not is never disturbed. The caller takes EINTR as proof that the fd blocks, and
 * does not touch it again.
 *
 * The timer costs nothing per call: it is armed by the first one and disarms itself at a tick that saw none since the
 * tick before. A call notes its activity before it begins, so a call that sleeps always meets one more tick.
 */
#ifndef HCD_NUDGE_H
#define HCD_NUDGE_H

#include <errno.h>
#include <signal.h>
#include <stdint.h>
#include <string.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

#define NUDGE_MS 50
#define NUDGE_SIGNAL SIGURG      /* ignored by default, so a late tick harms nobody */

static __thread volatile sig_atomic_t hcd_nudge_active;
static __thread volatile sig_atomic_t hcd_nudge_armed;
static __thread int hcd_nudge_made;
static __thread timer_t hcd_nudge_timer;

static void hcd_nudge_set(long ms)
{
    struct itimerspec t;
    memset(&t, 0, sizeof(t));
    t.it_value.tv_nsec = t.it_interval.tv_nsec = ms * 1000000L;
    timer_settime(hcd_nudge_timer, 0, &t, NULL);
}

static void hcd_nudge_tick(int number)
{
    (void)number;
    if (!hcd_nudge_armed)
        return;
    if (!hcd_nudge_active) {
        hcd_nudge_armed = 0;
        hcd_nudge_set(0);
    }
    hcd_nudge_active = 0;
}

static void hcd_nudge_arm(void)
{
    if (!hcd_nudge_made) {
        struct sigaction action;
        struct sigevent event;
        memset(&action, 0, sizeof(action));
        action.sa_handler = hcd_nudge_tick;      /* without SA_RESTART, that is the point */
        sigemptyset(&action.sa_mask);
        memset(&event, 0, sizeof(event));
        event.sigev_notify = SIGEV_THREAD_ID;
        event.sigev_signo = NUDGE_SIGNAL;
        event._sigev_un._tid = (pid_t)syscall(SYS_gettid);
        if (sigaction(NUDGE_SIGNAL, &action, NULL) != 0 || timer_create(CLOCK_MONOTONIC, &event, &hcd_nudge_timer) != 0)
            return;                              /* out of timers: as good as it was without */
        hcd_nudge_made = 1;
    }
    hcd_nudge_armed = 1;
    hcd_nudge_set(NUDGE_MS);
}

/* Call before a write to an eventfd that somebody else shares. */
static inline void hcd_nudge(void)
{
    hcd_nudge_active = 1;
    if (!hcd_nudge_armed)
        hcd_nudge_arm();
}

/* As read(2) of an eventfd, without sleeping whatever its flags are by now. */
static inline ssize_t hcd_read_eventfd(int fd, uint64_t *value)
{
    struct iovec whole = { value, sizeof(*value) };
    ssize_t n = preadv2(fd, &whole, 1, -1, RWF_NOWAIT);
    if (n >= 0 || errno != EOPNOTSUPP)
        return n;
    hcd_nudge();                /* an older kernel */
    return read(fd, value, sizeof(*value));
}

/* The thread will make no more such calls. */
static void hcd_nudge_end(void)
{
    if (hcd_nudge_made) {
        hcd_nudge_made = 0;
        hcd_nudge_armed = 0;
        timer_delete(hcd_nudge_timer);
    }
}

#endif
