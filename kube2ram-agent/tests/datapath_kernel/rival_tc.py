# A tc program that ends with TC_ACT_OK. `NETNS`, `HOW` ("link" or "pin") and `PIN` stand before this.
import ctypes, os, struct, sys
libc = ctypes.CDLL(None, use_errno=True)
assert not libc.setns(os.open(NETNS, os.O_RDONLY), 0x40000000)
def bpf(command, attributes):
    buffer = ctypes.create_string_buffer(attributes, len(attributes))
    result = libc.syscall(321, command, buffer, len(attributes))
    assert result >= 0, os.strerror(ctypes.get_errno())
    return result
# r0 = 0; exit
code = ctypes.create_string_buffer(struct.pack("=BBhi", 0xB7, 0, 0, 0) + struct.pack("=BBhi", 0x95, 0, 0, 0))
text = ctypes.create_string_buffer(b"GPL")
# BPF_PROG_LOAD of BPF_PROG_TYPE_SCHED_CLS
program = bpf(5, struct.pack("=IIQQIIQII16s", 3, 2, ctypes.addressof(code), ctypes.addressof(text), 0, 0, 0, 0, 0, b"rival"))
if HOW == "link":
    # BPF_LINK_CREATE on lo, BPF_TCX_EGRESS, BPF_F_BEFORE
    link = bpf(28, struct.pack("=IIII", program, 1, 47, 8))
else:
    path = ctypes.create_string_buffer(PIN.encode())
    bpf(6, struct.pack("=QII", ctypes.addressof(path), program, 0))
print("ready", flush=True)
sys.stdin.read()
