//! What jobs leave with the worker, and who may reach it.

use std::os::unix::process::CommandExt as _;
use std::process::Command;

use hutch_sandbox::Defence;
use serde_json::json;

use crate::attack::{Attack, Outcome, skipped};
use crate::site::{Site, job};

/// A user of the host runs a set-user-ID program that a job left in a volume.
fn run_from_the_store(site: &Site) -> Outcome {
    let script = "cp /usr/bin/id /kept/id && chmod 4755 /kept/id && ls -l /kept/id";
    let more = json!({"user": "root", "volumes": [{"volume": "kept", "target": "/kept"}]});
    site.stdout(&job(&["sh", "-c", script], &more));
    let left = site.data().join("volumes/kept/id");
    assert!(left.exists(), "the job left {}", left.display());
    match Command::new(&left).uid(65_533).gid(65_533).output() {
        Ok(output) => Outcome::Through(String::from_utf8_lossy(&output.stdout).trim().to_owned()),
        Err(e) => Outcome::Held(e.to_string()),
    }
}

#[test]
fn a57_set_user_id_programs_in_the_store() {
    Attack::new(
        "57: a user of the host runs a set-user-ID program from the store (CVE-2021-41091)",
        "the data directory is mode 0700",
        run_from_the_store,
    )
    .control(|| {
        let mut id = Command::new("/usr/bin/id");
        let ran = id.uid(65_533).gid(65_533).output().is_ok_and(|output| output.status.success());
        if ran {
            Ok("other programs are run by this user".to_owned())
        } else {
            Err("this user runs nothing".to_owned())
        }
    })
    .bites_without(&[Defence::PrivateStore])
    .run();
}

#[test]
fn a62_groups_and_foreign_ids_without_root() {
    skipped(
        "62: as an ordinary user: setgroups, maps of ids that are not the caller's",
        "setgroups is denied in the sandbox's user namespace",
        "part of the tests of the unprivileged mode",
    );
}
