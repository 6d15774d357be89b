"""Somebody else's connect4 program: rewrites one destination address. Attached until its standard input ends.

Runs as `python3 -c <this> <cgroup> <from> <to> <link|exclusive|override|multi>`; assembled by hand, because no compiler is at hand in a test machine.
"""
import ctypes, os, socket, struct, sys

PROG_LOAD, PROG_ATTACH, PROG_DETACH, LINK_CREATE = 5, 8, 9, 28
CGROUP_SOCK_ADDR, INET4_CONNECT, USER_IP4 = 18, 10, 4
FLAGS = {"exclusive": 0, "override": 1, "multi": 2}


def bpf(command, attributes):
    result = ctypes.CDLL(None, use_errno=True).syscall(321, command, attributes, len(attributes))
    if result < 0:
        sys.exit(os.strerror(ctypes.get_errno()))
    return result


def program(source, target):
    instruction = lambda code, registers, offset, value: struct.pack("=BBhi", code, registers, offset, value)
    word = lambda address: struct.unpack("=i", socket.inet_aton(address))[0]
    code = ctypes.create_string_buffer(b"".join([
        instruction(0x61, 0x12, USER_IP4, 0),      # r2 = context.user_ip4
        instruction(0x56, 0x02, 2, word(source)),  # if w2 != source skip two
        instruction(0xB4, 0x03, 0, word(target)),  # w3 = target
        instruction(0x63, 0x31, USER_IP4, 0),      # context.user_ip4 = r3
        instruction(0xB7, 0x00, 0, 1),             # r0 = 1: go on
        instruction(0x95, 0x00, 0, 0),
    ]))
    licence = ctypes.create_string_buffer(b"GPL")
    attributes = struct.pack("=IIQQIIQII16sII", CGROUP_SOCK_ADDR, 6, ctypes.addressof(code), ctypes.addressof(licence), 0, 0, 0, 0, 0, b"rival", 0, INET4_CONNECT)
    return bpf(PROG_LOAD, attributes)


_, cgroup, source, target, how = sys.argv
directory, loaded = os.open(cgroup, os.O_RDONLY), program(source, target)
if how == "link":
    link = bpf(LINK_CREATE, struct.pack("=IIII", loaded, directory, INET4_CONNECT, 0))
else:
    bpf(PROG_ATTACH, struct.pack("=IIII", directory, loaded, INET4_CONNECT, FLAGS[how]))
print("attached", flush=True)
sys.stdin.readline()
if how != "link":
    bpf(PROG_DETACH, struct.pack("=IIII", directory, loaded, INET4_CONNECT, 0))
