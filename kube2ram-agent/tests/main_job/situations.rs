//! The situations in which status, Events, alerts and the dashboard are tried: each comes about, and ends.

use kube2ram_sandbox::situation::Situation;

use crate::support::{Lab, eventually};

#[test]
#[ignore = "needs root: cargo xtask test"]
fn each_situation_comes_about_and_ends() {
    for situation in Situation::ALL {
        let mut lab = Lab::new(situation.name(), &[]);
        Situation::set_the_stage(&mut lab).unwrap();
        lab.add_agent(env!("CARGO_BIN_EXE_kube2ram").as_ref(), Situation::FLAGS).unwrap();
        lab.agent().unwrap().start().unwrap();

        situation.bring_about(&mut lab).unwrap();
        situation.go_on(&mut lab).unwrap();
        situation.end(&mut lab).unwrap();

        assert_eq!(lab.credentials(Situation::ORDERS, "orders-role"), "orders-role", "{situation:?}");
        if let Some((pod, role)) = situation.victim() {
            eventually(role.to_owned(), || lab.credentials(pod, role));
        }
        if situation == Situation::Drift {
            let repairs = r#"kube2ram_datapath_repairs_total{kind="detached"}"#;
            eventually(true, || lab.metric(repairs) >= 1.0);
        }
    }
}
