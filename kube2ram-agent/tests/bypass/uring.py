"""The same through io_uring: the calls are made by the kernel, maybe on a thread of its own."""
import ctypes, errno, mmap, os, socket, struct
from base import MAPPED, M, M6, Absent, ask, sent, tcp, udp

SETUP, ENTER = 425, 426
SQPOLL, ASYNC, GETEVENTS, SQ_WAKEUP = 2, 16, 1, 2
SENDMSG, CONNECT, SOCKET = 9, 16, 45
LIBC = ctypes.CDLL(None, use_errno=True)


def address(to):
    """A `struct sockaddr_in` or `sockaddr_in6`."""
    host, port = to
    if ":" in host:
        return struct.pack("=HHI16sI", socket.AF_INET6, socket.htons(port), 0, socket.inet_pton(socket.AF_INET6, host), 0)
    return struct.pack("=HH4s8x", socket.AF_INET, socket.htons(port), socket.inet_aton(host))


class Ring:
    """Eight entries, of which one is in use at a time."""

    def __init__(self, flags=0):
        params = ctypes.create_string_buffer(120)
        struct.pack_into("=III", params, 8, flags, 0, 1000)
        self.fd = LIBC.syscall(SETUP, 8, params)
        if self.fd < 0:
            raise Absent("io_uring")
        self.flags = flags
        submitted, completed = struct.unpack_from("=II", params)
        (_, self.tail, self.mask, _, _, _, self.array) = struct.unpack_from("=7I", params, 40)
        (self.head, _, self.completed_mask, _, _, self.completions) = struct.unpack_from("=6I", params, 80)
        self.submissions = self.map(0, self.array + 4 * submitted)
        self.results = self.map(0x8000000, self.completions + 16 * completed)
        self.entries = self.map(0x10000000, 64 * submitted)

    def map(self, offset, length):
        return mmap.mmap(self.fd, length, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE, offset=offset)

    def call(self, operation, fd, off=0, addr=0, length=0, flags=0):
        """Submits one entry and waits for what comes of it."""
        (tail,), (mask,) = struct.unpack_from("=I", self.submissions, self.tail), struct.unpack_from("=I", self.submissions, self.mask)
        index = tail & mask
        self.entries[64 * index : 64 * index + 64] = struct.pack("=BBHiQQI36x", operation, flags, 0, fd, off, addr, length)
        struct.pack_into("=I", self.submissions, self.array + 4 * index, index)
        struct.pack_into("=I", self.submissions, self.tail, tail + 1)
        wake = SQ_WAKEUP if self.flags & SQPOLL else 0
        if LIBC.syscall(ENTER, self.fd, 1, 1, GETEVENTS | wake, None, 0) < 0:
            raise OSError(ctypes.get_errno(), "")
        (head,), (mask,) = struct.unpack_from("=I", self.results, self.head), struct.unpack_from("=I", self.results, self.completed_mask)
        (result,) = struct.unpack_from("=i", self.results, self.completions + 16 * (head & mask) + 8)
        struct.pack_into("=I", self.results, self.head, head + 1)
        if result < 0:
            raise OSError(-result, "")
        return result

    def dial(self, s, to=M, flags=0):
        s.setblocking(True)
        target = ctypes.create_string_buffer(address(to))
        self.call(CONNECT, s.fileno(), len(target) - 1, ctypes.addressof(target), 0, flags)
        s.settimeout(2)
        return ask(s)

    def send(self, s, to=M):
        target, data = ctypes.create_string_buffer(address(to)), ctypes.create_string_buffer(b"x")
        vector = ctypes.create_string_buffer(struct.pack("=QQ", ctypes.addressof(data), 1))
        message = struct.pack("=QI4xQQQQi4x", ctypes.addressof(target), len(target) - 1, ctypes.addressof(vector), 1, 0, 0, 0)
        message = ctypes.create_string_buffer(message)
        self.call(SENDMSG, s.fileno(), 0, ctypes.addressof(message), 1)
        return sent()


def uring():
    return Ring().dial(tcp())


def uring6_mapped():
    return Ring().dial(tcp(socket.AF_INET6), MAPPED)


def v6_uring():
    return Ring().dial(tcp(socket.AF_INET6), M6)


def v6_uring_send():
    return Ring().send(udp(socket.AF_INET6), M6)


def uring_polled():
    """Submitted by a kernel thread that polls the ring."""
    return Ring(SQPOLL).dial(tcp())


def uring_worker():
    """Carried out by a worker thread."""
    return Ring().dial(tcp(), flags=ASYNC)


def uring_socket():
    """The socket is the ring's work too."""
    ring = Ring(SQPOLL)
    try:
        fd = ring.call(SOCKET, socket.AF_INET, socket.SOCK_STREAM)
    except OSError as error:
        if error.errno == errno.EINVAL:
            raise Absent("IORING_OP_SOCKET")
        raise
    return ring.dial(socket.socket(fileno=fd))


def uring_send():
    return Ring().send(udp())


def uring_send6_mapped():
    return Ring().send(udp(socket.AF_INET6), MAPPED)


def uring_send_polled():
    return Ring(SQPOLL).send(udp())
