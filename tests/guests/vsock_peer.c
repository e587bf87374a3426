/* What a guest does with sockets to its host, for tests/guests/test_vsock.py.
 *
 *   vsock_peer echo PORT COUNT      serve COUNT connections, each in a process: answer every byte with its complement,
 *                                   until the host says no more; then say no more
 *   vsock_peer talk PORT BYTES COUNT  COUNT connections at once to the host, which answers likewise: send BYTES, say no
 *                                   more, and check everything that comes back until the host says no more
 *   vsock_peer messages PORT        send messages of every size below to the host, each when the last one has come back
 *   vsock_peer mirror PORT          serve one connection for messages: send each back, until the host says no more
 *   vsock_peer idle PORT            connect, say so, and wait for the connection to end; print how it ended
 *
 * Exit status 0: every byte was right. */
#include <errno.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include <linux/vm_sockets.h>

#define HOST 2
static unsigned char buffer[65536];
static const size_t sizes[] = {1, 100, 4052, 4053, 60000, 65536};

static void fail(const char *what)
{
    fprintf(stderr, "vsock_peer: %s: %s\n", what, strerror(errno));
    exit(1);
}

static int open_socket(int type)
{
    int fd = socket(AF_VSOCK, type, 0);
    if (fd < 0)
        fail("socket");
    return fd;
}

static int reach(unsigned port, int type)
{
    struct sockaddr_vm to = {.svm_family = AF_VSOCK, .svm_cid = HOST, .svm_port = port};
    int fd = open_socket(type);
    if (connect(fd, (struct sockaddr *)&to, sizeof to))
        fail("connect");
    return fd;
}

static void send_all(int fd, const unsigned char *data, size_t size)
{
    while (size) {
        ssize_t n = write(fd, data, size);
        if (n <= 0)
            fail("write");
        data += n;
        size -= n;
    }
}

/* The byte at offset AT of the stream with number SALT: repeats after 251 * 256 bytes, so that what is lost, doubled
 * or moved shows. */
static unsigned char byte_at(uint64_t at, unsigned salt)
{
    return (unsigned char)(at % 251 + at / 251 + salt);
}

static int answer(int fd)
{
    for (;;) {
        ssize_t n = read(fd, buffer, sizeof buffer);
        if (n < 0)
            fail("read");
        if (n == 0)
            break;
        for (ssize_t i = 0; i < n; i++)
            buffer[i] = ~buffer[i];
        send_all(fd, buffer, n);
    }
    if (shutdown(fd, SHUT_WR))
        fail("shutdown");
    while (read(fd, buffer, 1) > 0) /* the host closes when it has everything */
        ;
    return 0;
}

static int send_stream(int fd, uint64_t size, unsigned salt)
{
    for (uint64_t at = 0; at < size;) {
        size_t n = size - at < sizeof buffer ? size - at : sizeof buffer;
        for (size_t i = 0; i < n; i++)
            buffer[i] = byte_at(at + i, salt);
        send_all(fd, buffer, n);
        at += n;
    }
    return shutdown(fd, SHUT_WR) ? 1 : 0;
}

static int check_stream(int fd, uint64_t size, unsigned salt)
{
    uint64_t at = 0;
    ssize_t n;
    while ((n = read(fd, buffer, sizeof buffer)) > 0)
        for (ssize_t i = 0; i < n; i++, at++)
            if (buffer[i] != (unsigned char)~byte_at(at, salt)) {
                fprintf(stderr, "vsock_peer: byte %llu is wrong\n", (unsigned long long)at);
                return 1;
            }
    if (n < 0)
        fail("read");
    return at != size;
}

static int wait_all(int count)
{
    int bad = 0, status;
    while (count-- > 0)
        if (wait(&status) < 0 || status)
            bad = 1;
    return bad;
}

static int talk(unsigned port, uint64_t size, int count)
{
    int *fds = calloc(count, sizeof *fds);
    for (int i = 0; i < count; i++)
        fds[i] = reach(port, SOCK_STREAM); /* all are open before the first one says anything */
    for (int i = 0; i < count; i++) {
        if (!fork())
            exit(send_stream(fds[i], size, i));
        if (!fork())
            exit(check_stream(fds[i], size, i));
    }
    return wait_all(2 * count);
}

static int listen_at(unsigned port, int type)
{
    struct sockaddr_vm at = {.svm_family = AF_VSOCK, .svm_cid = VMADDR_CID_ANY, .svm_port = port};
    int fd = open_socket(type);
    if (bind(fd, (struct sockaddr *)&at, sizeof at) || listen(fd, 128))
        fail("listen");
    printf("HCD: listening=%u\n", port);
    fflush(stdout);
    return fd;
}

static int echo(unsigned port, int count)
{
    int fd = listen_at(port, SOCK_STREAM);
    for (int i = 0; i < count; i++) {
        int peer = accept(fd, NULL, NULL);
        if (peer < 0)
            fail("accept");
        if (!fork())
            exit(answer(peer));
        close(peer);
    }
    return wait_all(count);
}

static int messages(unsigned port)
{
    int fd = reach(port, SOCK_SEQPACKET);
    for (unsigned i = 0; i < sizeof sizes / sizeof *sizes; i++) {
        for (size_t at = 0; at < sizes[i]; at++)
            buffer[at] = byte_at(at, i);
        if (send(fd, buffer, sizes[i], 0) != (ssize_t)sizes[i])
            fail("send");
        memset(buffer, 0, sizeof buffer);
        ssize_t got = recv(fd, buffer, sizeof buffer, 0);
        if (got != (ssize_t)sizes[i]) {
            fprintf(stderr, "vsock_peer: a message of %zu bytes came back with %zd\n", sizes[i], got);
            return 1;
        }
        for (size_t at = 0; at < sizes[i]; at++)
            if (buffer[at] != (unsigned char)~byte_at(at, i))
                return 1;
    }
    return 0;
}

static int mirror(unsigned port)
{
    ssize_t n;
    int peer = accept(listen_at(port, SOCK_SEQPACKET), NULL, NULL);
    while ((n = recv(peer, buffer, sizeof buffer, 0)) > 0)
        if (send(peer, buffer, n, 0) != n)
            fail("send");
    return n < 0;
}

static int idle(unsigned port)
{
    int fd = reach(port, SOCK_STREAM);
    puts("HCD: idle=connected");
    fflush(stdout);
    ssize_t n = read(fd, buffer, 1);
    printf("HCD: idle-ended=%s\n", n > 0 ? "data" : n == 0 ? "end" : strerror(errno));
    return 0;
}

int main(int count, char **words)
{
    if (count == 4 && !strcmp(words[1], "echo"))
        return echo(atoi(words[2]), atoi(words[3]));
    if (count == 5 && !strcmp(words[1], "talk"))
        return talk(atoi(words[2]), strtoull(words[3], NULL, 10), atoi(words[4]));
    if (count == 3 && !strcmp(words[1], "messages"))
        return messages(atoi(words[2]));
    if (count == 3 && !strcmp(words[1], "mirror"))
        return mirror(atoi(words[2]));
    if (count == 3 && !strcmp(words[1], "idle"))
        return idle(atoi(words[2]));
    return 2;
}
