"""Virtual servers of IPVS, by setsockopt(2) as ipvsadm made them before netlink (include/uapi/linux/ip_vs.h)."""
import errno, socket, struct
from base import M, Absent, dial, sent, tcp, tool, udp
from frames import gateway_address

IP_VS_SO_SET_ADD, IP_VS_SO_SET_FLUSH, IP_VS_SO_SET_ADDDEST = 1154, 1157, 1159


def configure(option, value):
    try:
        socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW).setsockopt(socket.IPPROTO_IP, option, value)
    except OSError as error:
        if error.errno == errno.ENOPROTOOPT:
            raise Absent("IPVS")
        raise


def serve(address):
    """Port 80 of an address becomes the metadata server's, by translation, which is what kube-proxy makes."""
    port = struct.pack("!H2x", 80)
    service = struct.pack("=H2x4s4sI16sII4s", socket.IPPROTO_TCP, socket.inet_aton(address), port, 0, b"rr", 0, 0, b"\xff" * 4)
    translated, weight = 0, 1
    configure(IP_VS_SO_SET_ADD, service)
    configure(IP_VS_SO_SET_ADDDEST, service + struct.pack("=4s4sIiII", socket.inet_aton(M[0]), port, translated, weight, 0, 0))
    return sent()


def serve_nothing():
    configure(IP_VS_SO_SET_FLUSH, b"")
    return sent()


def own_server(address):
    """A virtual server in the pod's own network namespace, which sends on what a socket of the pod's has sent."""
    serve_nothing()
    serve(address)
    tool(*f"ip addr replace {address}/32 dev lo".split())
    way_out = udp()
    way_out.connect((gateway_address(), 9))
    s = tcp()
    s.bind((way_out.getsockname()[0], 0))
    return dial(s, (address, 80))
