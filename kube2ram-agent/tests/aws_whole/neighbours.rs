//! Addresses next to the metadata server's that belong to others: every pod reaches them, with an agent and
//! without.

use std::{
    io::Write as _,
    net::{IpAddr, SocketAddr, TcpListener, UdpSocket},
    thread,
};

use crate::support::{LIST, Lab, eventually, pod, run};

/// By TCP.
const STREAMS: [(&str, u16); 8] = [
    // The credentials of ECS tasks.
    ("169.254.170.2", 80),
    // The agent of EKS Pod Identity.
    ("169.254.170.23", 80),
    ("169.254.170.23", 2703),
    ("fd00:ec2::23", 80),
    ("fd00:ec2::23", 2703),
    // NodeLocal DNS, and the resolver of the VPC.
    ("169.254.20.10", 53),
    ("169.254.169.253", 53),
    ("fd00:ec2::253", 53),
];
/// By UDP: the same resolvers, and the time service.
const DATAGRAMS: [(&str, u16); 5] = [
    ("169.254.20.10", 53),
    ("169.254.169.253", 53),
    ("fd00:ec2::253", 53),
    ("169.254.169.123", 123),
    ("fd00:ec2::123", 123),
];

/// Sends a datagram to an address and prints what comes back.
const ASK: &str = "import socket, sys
host, port = sys.argv[1], int(sys.argv[2])
s = socket.socket(socket.AF_INET6 if ':' in host else socket.AF_INET, socket.SOCK_DGRAM)
s.settimeout(5)
s.sendto(b'x', (host, port))
print(s.recv(64).decode())";

fn socket_addr((ip, port): (&str, u16)) -> SocketAddr {
    SocketAddr::new(ip.parse().unwrap(), port)
}

/// Gives the node the addresses, and a server at each that answers with its own address. The servers end with
/// the process.
fn serve(lab: &Lab) {
    let mut ips: Vec<IpAddr> = STREAMS.iter().chain(&DATAGRAMS).map(|row| socket_addr(*row).ip()).collect();
    ips.sort_unstable();
    ips.dedup();
    for ip in ips {
        let mut add = lab.node().host_command("ip");
        add.args(["addr", "add", &ip.to_string(), "dev", "lo"]);
        if ip.is_ipv6() {
            add.arg("nodad");
        }
        assert_eq!(run(&mut add), (Some(0), String::new()), "{ip}");
    }
    for addr in STREAMS.map(socket_addr) {
        let listener = TcpListener::bind(addr).unwrap();
        thread::spawn(move || {
            for mut stream in listener.incoming().flatten() {
                drop(stream.write_all(addr.to_string().as_bytes()));
            }
        });
    }
    for addr in DATAGRAMS.map(socket_addr) {
        let socket = UdpSocket::bind(addr).unwrap();
        thread::spawn(move || {
            let mut buffer = [0; 64];
            while let Ok((_, peer)) = socket.recv_from(&mut buffer) {
                drop(socket.send_to(addr.to_string().as_bytes(), peer));
            }
        });
    }
}

/// What a pod gets from one of the servers.
fn read_stream(lab: &Lab, pod: &str, addr: SocketAddr) -> String {
    let mut client = lab.pod(pod).unwrap().client("app").unwrap();
    let (code, printed) = run(client.args(["raw", "--connect", &addr.to_string(), "--hex", ""]));
    assert_eq!(code, Some(0), "{pod} {addr}: {printed}");
    String::from_utf8(hex::decode(&printed).unwrap()).unwrap()
}

fn read_datagram(lab: &Lab, pod: &str, addr: SocketAddr) -> String {
    let mut python = lab.pod(pod).unwrap().pod().command("app", "python3").unwrap();
    let args = ["-c", ASK, &addr.ip().to_string(), &addr.port().to_string()];
    let (code, printed) = run(python.args(args));
    assert_eq!(code, Some(0), "{pod} {addr}: {printed}");
    printed
}

fn assert_untouched(lab: &Lab, when: &str) {
    for pod in ["orders", "daemon"] {
        for addr in STREAMS.map(socket_addr) {
            assert_eq!(read_stream(lab, pod, addr), addr.to_string(), "{when}: {pod} by TCP");
        }
        for addr in DATAGRAMS.map(socket_addr) {
            assert_eq!(read_datagram(lab, pod, addr), addr.to_string(), "{when}: {pod} by UDP");
        }
    }
}

#[test]
#[ignore = "needs root: cargo xtask test"]
fn task_credentials_pod_identity_names_and_time_stay_untouched() {
    let mut lab = Lab::new("aws-neighbours", &[pod("orders"), pod("daemon").host_network()]);
    serve(&lab);
    assert_untouched(&lab, "without an agent");
    lab.start(&[]);
    eventually(1.0, || lab.agent().unwrap().metric("kube2ram_pod_listeners").unwrap());

    assert_untouched(&lab, "with the agent");
    // The twin: the metadata server's own address is another matter.
    for pod in ["orders", "daemon"] {
        assert_eq!(lab.ask(pod, LIST).body, format!("{pod}-role"));
    }

    lab.agent().unwrap().kill().unwrap();
    assert_untouched(&lab, "with the agent killed");
    for pod in ["orders", "daemon"] {
        let refused = lab.pod(pod).unwrap().curl(LIST).unwrap_err();
        assert!(format!("{refused:#}").contains("Connection refused"), "{pod}: {refused:#}");
    }
    assert_eq!(lab.leaks(), []);
}
