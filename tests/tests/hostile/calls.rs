//! Attacks that are system calls.

use hutch_sandbox::Defence;

use crate::attempts::attack;

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
