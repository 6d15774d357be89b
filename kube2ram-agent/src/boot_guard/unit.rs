//! The text of the systemd unit. Pure; called by `boot_guard`. Source: systemd.unit(5), systemd.service(5).

use std::path::Path;

use super::{BINARY, Guard};

/// Kubelets and container runtimes, which a guard that comes later would have missed. Distributions have both
/// in one unit: k3s, RKE2, k0s, MicroK8s (a snap). Units that a host does not have cost nothing.
const BEFORE: &str = "kubelet.service containerd.service docker.service crio.service k3s.service k3s-agent.service rke2-server.service \
                      rke2-agent.service k0scontroller.service k0sworker.service snap.microk8s.daemon-kubelite.service \
                      snap.microk8s.daemon-containerd.service";

/// Writes the unit. It passes every flag explicitly, so that another version's defaults change nothing.
pub(super) fn text(guard: &Guard, required_by_kubelet: bool) -> String {
    let Guard { bpf_dir, cgroup_root, forward_guard, host_cgroups, metadata } = guard;
    let path = |path: &Path| path.display().to_string();
    let mut arguments = vec![
        format!("--metadata-addr={}", metadata.v4.ip()),
        format!("--metadata-addr6={}", metadata.v6.map(|v6| v6.to_string()).unwrap_or_default()),
        format!("--bpf-dir={}", path(bpf_dir)),
        format!("--forward-guard={}", if *forward_guard { "auto" } else { "off" }),
    ];
    arguments.extend(cgroup_root.iter().map(|root| format!("--cgroup-root={}", path(root))));
    arguments.extend(host_cgroups.iter().map(|cgroup| format!("--host-cgroup={}", path(cgroup))));
    let arguments: String = arguments.iter().map(|argument| format!(" {}", quoted(argument))).collect();
    // A slice has no cgroup, hence no number to know it by, before it is started.
    let slices: Vec<_> =
        host_cgroups.iter().map(|cgroup| path(cgroup)).filter(|name| is_slice(name)).collect();
    let slices =
        if slices.is_empty() { String::new() } else { format!("Wants={0}\nAfter={0}\n", slices.join(" ")) };
    let required_by = if required_by_kubelet { "RequiredBy=kubelet.service\n" } else { "" };
    format!(
        "# Written by `kube2ram boot-guard install`; `kube2ram boot-guard remove` removes it.\n\
         [Unit]\n\
         Description=kube2ram boot guard: no metadata server for containers until the agent is active\n\
         Before={BEFORE}\n\
         {slices}\
         \n\
         [Service]\n\
         Type=oneshot\n\
         RemainAfterExit=yes\n\
         ExecStart=/{}/{} boot-guard apply{arguments}\n\
         # The kubelet waits for it, but not for ever.\n\
         TimeoutStartSec=30\n\
         LimitMEMLOCK=infinity\n\
         \n\
         [Install]\n\
         WantedBy=multi-user.target\n\
         {required_by}",
        BINARY.0, BINARY.1
    )
}

/// A top-level slice: another would not be at the root by its own name.
fn is_slice(name: &str) -> bool {
    let stem = name.strip_suffix(".slice");
    stem.is_some_and(|stem| {
        !stem.is_empty() && stem.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"_.".contains(&byte))
    })
}

/// As one word of `ExecStart=`, whatever is in it.
fn quoted(word: &str) -> String {
    if !word.is_empty() && word.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_=./:".contains(&byte))
    {
        return word.to_owned();
    }
    let mut quoted = String::from('"');
    for character in word.chars() {
        match character {
            '"' | '\\' => quoted.extend(['\\', character]),
            // Specifiers and variables.
            '%' | '$' => quoted.extend([character, character]),
            character if character.is_ascii_control() => {
                quoted.push_str(&format!("\\x{:02x}", u32::from(character)));
            }
            character => quoted.push(character),
        }
    }
    quoted.push('"');
    quoted
}

#[cfg(test)]
mod tests {
    use kube2ram_cloud::MetadataAddr;

    use super::*;

    fn guard() -> Guard {
        Guard {
            bpf_dir: "/sys/fs/bpf/kube2ram".into(),
            cgroup_root: None,
            forward_guard: true,
            host_cgroups: ["init.scope", "system.slice", "user.slice"].map(Into::into).into(),
            metadata: MetadataAddr {
                v4: "100.100.100.200:80".parse().unwrap(),
                v6: Some("fd00:100::100:200".parse().unwrap()),
            },
        }
    }

    #[test]
    fn comes_before_the_kubelet_and_after_the_slices_that_it_must_know() {
        let text = text(&guard(), false);

        assert!(
            text.contains(
                "\nBefore=kubelet.service containerd.service docker.service crio.service k3s.service k3s-agent.service rke2-server.service \
                 rke2-agent.service k0scontroller.service k0sworker.service snap.microk8s.daemon-kubelite.service \
                 snap.microk8s.daemon-containerd.service\n"
            ),
            "{text}"
        );
        assert!(text.contains("\nWants=system.slice user.slice\nAfter=system.slice user.slice\n"), "{text}");
        assert!(text.contains("\nTimeoutStartSec=30\n") && text.contains("\nWantedBy=multi-user.target\n"));
        assert!(!text.contains("RequiredBy"));
        assert!(
            text.contains(
                "\nExecStart=/opt/kube2ram/bin/kube2ram boot-guard apply --metadata-addr=100.100.100.200 --metadata-addr6=fd00:100::100:200 --bpf-dir=/sys/fs/bpf/kube2ram \
                 --forward-guard=auto --host-cgroup=init.scope --host-cgroup=system.slice --host-cgroup=user.slice\n"
            ),
            "{text}"
        );
    }

    #[test]
    fn the_kubelet_may_be_made_to_need_it() {
        assert!(text(&guard(), true).ends_with("WantedBy=multi-user.target\nRequiredBy=kubelet.service\n"));
    }

    #[test]
    fn one_argument_stays_one() {
        assert_eq!(quoted("--bpf-dir=/sys/fs/bpf"), "--bpf-dir=/sys/fs/bpf");
        assert_eq!(quoted("--bpf-dir=/a b\"$x%n\\\n"), r#""--bpf-dir=/a b\"$$x%%n\\\x0a""#);
    }

    #[test]
    fn only_top_level_slices_are_started() {
        for (name, is) in [
            ("user.slice", true),
            ("a-b.slice", false),
            ("init.scope", false),
            ("x y.slice", false),
            (".slice", false),
        ] {
            assert_eq!(is_slice(name), is, "{name}");
        }
    }
}
