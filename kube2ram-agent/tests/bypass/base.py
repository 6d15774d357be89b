"""What the ways have in common: the metadata server, sockets and requests."""
import errno, socket

M = ("100.100.100.200", 80)
MAPPED = ("::ffff:" + M[0], M[1])
REQUEST = b"GET /latest/meta-data/ram/security-credentials/ HTTP/1.0\r\nHost: 100.100.100.200\r\n\r\n"


class Absent(Exception):
    """This kernel cannot do it."""


def made(*arguments):
    """A socket; the kernel loads the module of a protocol that it has."""
    try:
        return socket.socket(*arguments)
    except OSError as error:
        if error.errno in (errno.EPROTONOSUPPORT, errno.ESOCKTNOSUPPORT, errno.EAFNOSUPPORT):
            raise Absent
        raise


def tcp(family=socket.AF_INET, protocol=0):
    s = socket.socket(family, socket.SOCK_STREAM, protocol)
    s.settimeout(2)
    return s


def answer(s):
    data = b""
    while chunk := s.recv(4096):
        data += chunk
    head, _, body = data.partition(b"\r\n\r\n")
    status = head.split()[1].decode()
    return body.decode().strip() if status == "200" else status


def ask(s):
    s.sendall(REQUEST)
    return answer(s)


def dial(s, to=M):
    s.connect(to)
    return ask(s)


def udp(family=socket.AF_INET):
    return socket.socket(family, socket.SOCK_DGRAM)


def sent():
    return "sent"
