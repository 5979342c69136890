//! Attacks that are system calls.

use hutch_sandbox::Defence;

use serde_json::json;

use crate::attack::{Attack, Outcome};
use crate::attempts::{attack, exist, strike};
use crate::site::hostile_outside;

#[test]
fn a13_nested_user_namespace() {
    attack(
        "13: a user namespace of its own (CVE-2022-0492 and most local exploits)",
        "seccomp looks at the flags of clone and unshare",
        &[
            "unshare_user",
            "unshare_mount",
            "unshare_net",
            "unshare_pid",
            "unshare_ipc",
            "unshare_uts",
            "clone_user",
            "clone_mount",
            "clone_pid",
            "clone_high_bits",
        ],
    )
    .bites_without(&[Defence::Seccomp])
    .run();
}

#[test]
fn a14_clone3_hides_its_flags() {
    attack(
        "14: clone3, whose flags no filter sees",
        "seccomp: ENOSYS, so that libraries use clone",
        &["clone3_user"],
    )
    .bites_without(&[Defence::Seccomp])
    .run();
}

#[test]
fn a15_calls_of_other_architectures() {
    attack(
        "15: system calls by int 0x80 and x32",
        "seccomp: the native architecture alone",
        &["i386", "x32"],
    )
    .bites_without(&[Defence::Seccomp])
    .run();
}

#[test]
fn a16_namespaces_and_mounts() {
    attack(
        "16: setns, kcmp, pidfd_getfd, and every call that mounts",
        "seccomp; no capabilities",
        &[
            "setns",
            "kcmp",
            "pidfd_getfd",
            "mount",
            "mount_bind",
            "mount_remount",
            "umount",
            "pivot_root",
            "chroot",
            "open_tree",
            "fsopen",
            "move_mount",
            "mount_setattr",
        ],
    )
    .bites_without(&[Defence::Seccomp])
    .run();
}

#[test]
fn a17_wide_interfaces_of_the_kernel() {
    attack(
        "17: io_uring, userfaultfd, bpf, perf_event_open, keyrings, file handles, memfd_secret, other processes' memory",
        "seccomp",
        &[
            "io_uring_setup", "userfaultfd", "bpf", "perf_event_open", "keyctl", "add_key", "request_key",
            "open_by_handle_at", "name_to_handle_at", "memfd_secret", "process_vm_readv", "ptrace", "vmsplice",
            "move_pages", "migrate_pages", "fanotify_init",
        ],
    )
    .bites_without(&[Defence::Seccomp])
    .run();
}

#[test]
fn a18_families_of_sockets() {
    attack(
        "18: sockets beyond unix, inet and inet6",
        "seccomp: a list of families",
        &["socket_netlink", "socket_packet", "socket_vsock", "socket_alg", "socket_key"],
    )
    .bites_without(&[Defence::Seccomp])
    .run();
}

#[test]
fn a21_mknod() {
    attack(
        "21: make a device node",
        "seccomp; no capabilities; a user namespace",
        &["mknod_character", "mknod_block"],
    )
    .bites_without(&[Defence::Seccomp, Defence::Capabilities, Defence::UserNamespace])
    .run();
}

#[test]
fn a25_messages_of_the_kernel() {
    Attack::new("25: /dev/kmsg, syslog(2)", "seccomp; a device tree of its own", |site| {
        let opened = site.hostile(&["read", "/dev/kmsg"], &json!({"user": "root"}));
        assert_eq!(opened, "/dev/kmsg ENOENT\n");
        strike(site, &["syslog"])
    })
    .control(|| exist(&["syslog"]))
    .bites_without(&[Defence::Seccomp, Defence::Capabilities, Defence::UserNamespace])
    .run();
}

#[test]
fn a31_the_host_s_clock() {
    attack("31: set the clock", "seccomp", &["settimeofday", "clock_settime", "clock_adjtime"])
        .bites_without(&[Defence::Seccomp])
        .run();
}

/// Which of the ways to type into a terminal work.
fn typed(said: &str) -> Vec<String> {
    said.lines().filter_map(|line| line.strip_suffix(" OK")).map(str::to_owned).collect()
}

#[test]
fn a22_typing_into_a_terminal() {
    let words = ["type-into-terminal"];
    Attack::new(
        "22: TIOCSTI, also with high bits set (CVE-2019-10063)",
        "seccomp compares 32 bits",
        |site| {
            let said = site.hostile(&words, &json!({"user": "1001:1001"}));
            assert!(said.contains("plain ") && !said.contains("no terminal"), "{said}");
            Outcome::of(&typed(&said), said)
        },
    )
    .control(|| {
        let said = hostile_outside(&words)?;
        if typed(&said).is_empty() { Err(said) } else { Ok("the terminal takes it".to_owned()) }
    })
    .bites_without(&[Defence::Seccomp])
    .run();
}
