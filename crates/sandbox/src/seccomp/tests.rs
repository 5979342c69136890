//! The filters are run, on every number and on other machines' calls, by an interpreter of the instructions.

use hutch_sandbox_sys::bpf::Instruction;

use super::compile::{
    AND, JUMP_AT_LEAST, JUMP_EQUAL, LOAD_WORD, NATIVE_ARCH, RETURN, RETURN_ALLOW, RETURN_ERRNO,
    RETURN_NOTIFY, compile, telling,
};
use super::policy::{EPERM, number};
use super::*;

const ENOSYS: u32 = libc::ENOSYS.unsigned_abs();
const EINVAL: u32 = libc::EINVAL.unsigned_abs();
const EAFNOSUPPORT: u32 = libc::EAFNOSUPPORT.unsigned_abs();
const KEY: [u64; 2] = [0x0123_4567_89ab_cdef, 0xfedc_ba98_7654_3210];

fn filter_of(profile: SeccompProfile) -> Vec<Instruction> {
    compile(&actions(profile).expect("policy"), KEY).expect("short")
}

/// Runs a filter as the kernel would.
fn run(filter: &[Instruction], arch: u32, number: u32, arguments: [u64; 6]) -> u32 {
    run_counted(filter, arch, number, arguments).0
}

/// The answer, and how many instructions it took.
fn run_counted(filter: &[Instruction], arch: u32, number: u32, arguments: [u64; 6]) -> (u32, usize) {
    let mut data = Vec::new();
    data.extend(number.to_le_bytes());
    data.extend(arch.to_le_bytes());
    data.extend([0; 8]);
    data.extend(arguments.iter().flat_map(|argument| argument.to_le_bytes()));
    let (mut at, mut accumulator, mut count) = (0_usize, 0_u32, 0);
    loop {
        count += 1;
        let instruction = filter[at];
        at += 1;
        let k = instruction.operand;
        let mut go = |holds: bool| {
            at += usize::from(if holds { instruction.jump_true } else { instruction.jump_false });
        };
        match instruction.code {
            LOAD_WORD => {
                let place = k as usize;
                accumulator = u32::from_le_bytes(data[place..place + 4].try_into().expect("4 bytes"));
            }
            AND => accumulator &= k,
            JUMP_EQUAL => go(accumulator == k),
            JUMP_AT_LEAST => go(accumulator >= k),
            RETURN => return (k, count),
            code => panic!("opcode {code:#x}"),
        }
    }
}

fn call_in(profile: SeccompProfile, name: &str, arguments: [u64; 6]) -> u32 {
    run(&filter_of(profile), NATIVE_ARCH, number(name).expect(name), arguments)
}

fn call(name: &str, arguments: [u64; 6]) -> u32 {
    call_in(SeccompProfile::Default, name, arguments)
}

#[test]
fn every_number_gets_the_action_of_the_policy() {
    for profile in PROFILES {
        let actions = actions(profile).expect("policy");
        let filter = filter_of(profile);
        for number in (0..2000).chain(0x4000_0000..0x4000_0400).chain([u32::MAX]) {
            let wanted = match actions.get(&number) {
                Some(Action::Allow) => RETURN_ALLOW,
                Some(Action::Errno(errno)) => RETURN_ERRNO | errno,
                Some(Action::When(_)) => continue,
                // x32's numbers, from 0x4000_0000 on, are among them.
                None => RETURN_ERRNO | ENOSYS,
            };
            assert_eq!(run(&filter, NATIVE_ARCH, number, [0; 6]), wanted, "number {number}");
        }
        assert!(filter.len() < 220, "{} instructions", filter.len());
    }
}

#[test]
fn a_call_is_decided_in_a_few_instructions() {
    for profile in PROFILES {
        let filter = filter_of(profile);
        let counts: Vec<_> =
            (0..500).map(|number| run_counted(&filter, NATIVE_ARCH, number, [0; 6]).1).collect();
        // Three to see the machine and load the number, seven or less to find the range, the answer, and for some the rule.
        assert!(*counts.iter().max().expect("calls") <= 24, "{:?}", counts.iter().max());
        let read = number("read").expect("read");
        assert!(counts[read as usize] <= 12, "read takes {}", counts[read as usize]);
    }
}

#[test]
fn every_name_is_a_system_call_somewhere() {
    let elsewhere = "_llseek fcntl64 sendfile64 _newselect waitpid sigreturn mmap2 send recv stime open_tree_attr \
                     epoll_ctl_old epoll_wait_old set_mempolicy_home_node";
    for text in [DEFAULT, STRICT] {
        let policy = Policy::parse(text).expect("policy");
        for (name, _) in policy.entries() {
            let known = number(name).is_some() || elsewhere.split_whitespace().any(|other| other == name);
            assert!(known || cfg!(not(target_arch = "x86_64")), "`{name}` is no system call");
        }
        for family in &policy.family {
            assert!(family.reason.split_whitespace().count() > 3, "{}: no reason is given", family.name);
        }
    }
}

#[test]
fn only_refusals_are_told() {
    for profile in PROFILES {
        let quiet = filter_of(profile);
        let telling = telling(quiet.clone());
        let refused = RETURN_ERRNO | EPERM;
        for number in 0..600 {
            for argument in [0, 1, 16, 0x1000_0000, u64::MAX] {
                let answer = |filter: &[Instruction]| run(filter, NATIVE_ARCH, number, [argument; 6]);
                let wanted = match answer(&quiet) {
                    answer if answer == refused => RETURN_NOTIFY,
                    other => other,
                };
                assert_eq!(answer(&telling), wanted, "number {number}, argument {argument:#x}");
            }
        }
    }
}

#[test]
fn a_strict_program_has_no_sockets_and_starts_no_other() {
    let strict = |name, arguments| call_in(SeccompProfile::Strict, name, arguments);
    let refused = RETURN_ERRNO | EPERM;
    for name in ["socket", "socketpair"] {
        for family in [1, 2, 10, 16] {
            assert_eq!(strict(name, [family, 1, 0, 0, 0, 0]), refused, "{name} {family}");
        }
    }
    assert_eq!(strict("execve", [7, 8, 9, KEY[0], KEY[1], 0]), RETURN_ALLOW);
    for bit in 0..64 {
        assert_eq!(strict("execve", [7, 8, 9, KEY[0] ^ (1 << bit), KEY[1], 0]), refused, "bit {bit}");
        assert_eq!(strict("execve", [7, 8, 9, KEY[0], KEY[1] ^ (1 << bit), 0]), refused, "bit {bit}");
    }
    assert_eq!(strict("execve", [7, 8, 9, 0, 0, 0]), refused);
    assert_eq!(strict("execveat", [0, 7, 8, KEY[0], KEY[1], 0]), refused);
    for name in ["read", "mmap", "fork", "futex"] {
        assert_eq!(strict(name, [0; 6]), RETURN_ALLOW, "{name}");
    }
    assert_eq!(strict("ptrace", [0; 6]), refused);
}

#[test]
fn keys_differ_and_every_job_has_a_filter() {
    let (one, other) = (filters().expect("filters"), filters().expect("filters"));
    assert_ne!(one.start_key, other.start_key);
    let mut seen = std::collections::BTreeSet::new();
    for profile in PROFILES {
        for refused in [SeccompRefused::Errno, SeccompRefused::Report, SeccompRefused::Kill] {
            let index = index(profile, refused);
            let filter = &one.programs[usize::from(index)];
            let told = filter.iter().any(|i| i.operand == RETURN_NOTIFY && i.code == RETURN);
            assert_eq!(told, refused != SeccompRefused::Errno);
            seen.insert(index);
        }
    }
    assert_eq!(seen.len(), one.programs.len());
}

#[test]
fn other_architectures_are_refused() {
    const I386: u32 = 0x4000_0003;
    for filter in PROFILES.map(filter_of) {
        for arch in [I386, 0, u32::MAX] {
            for number in (0..600).chain([0x4000_0000, u32::MAX]) {
                assert_eq!(run(&filter, arch, number, [0; 6]), RETURN_ERRNO | ENOSYS, "{arch:#x} {number}");
            }
        }
    }
}

#[test]
fn arguments_are_looked_at() {
    let denied = RETURN_ERRNO | EPERM;
    assert_eq!(call("clone", [0x0001_2011, 0, 0, 0, 0, 0]), RETURN_ALLOW);
    for flag in [0x0002_0000, 0x0200_0000, 0x0400_0000, 0x0800_0000, 0x1000_0000, 0x2000_0000, 0x4000_0000] {
        assert_eq!(call("clone", [flag | 0x11, 0, 0, 0, 0, 0]), denied, "{flag:#x}");
    }
    assert_eq!(call("clone3", [0; 6]), RETURN_ERRNO | ENOSYS);
    assert_eq!(call("ioctl", [0, 0x5401, 0, 0, 0, 0]), RETURN_ALLOW);
    assert_eq!(call("ioctl", [0, 0x5412, 0, 0, 0, 0]), denied);
    assert_eq!(call("ioctl", [0, 0xdead_0000_5412, 0, 0, 0, 0]), denied, "high bits set");
    assert_eq!(call("ioctl", [0, 0x541C, 0, 0, 0, 0]), denied);
    for family in [1, 2, 10] {
        assert_eq!(call("socket", [family, 1, 0, 0, 0, 0]), RETURN_ALLOW);
    }
    for family in [0, 3, 15, 16, 17, 31, 38, 40] {
        assert_eq!(call("socket", [family, 1, 0, 0, 0, 0]), RETURN_ERRNO | EAFNOSUPPORT, "{family}");
    }
    assert_eq!(call("personality", [0; 6]), RETURN_ALLOW);
    assert_eq!(call("personality", [0xffff_ffff, 0, 0, 0, 0, 0]), RETURN_ALLOW);
    assert_eq!(call("personality", [0x0004_0000, 0, 0, 0, 0, 0]), denied);
    assert_eq!(call("prctl", [u64::from(libc::PR_SET_NAME.unsigned_abs()), 0, 0, 0, 0, 0]), RETURN_ALLOW);
    assert_eq!(call("prctl", [0xf_0000_0016, 2, 0, 0, 0, 0]), RETURN_ERRNO | EINVAL, "PR_SET_SECCOMP");
    assert_eq!(call("seccomp", [1, 0, 0, 0, 0, 0]), RETURN_ERRNO | EINVAL, "SECCOMP_SET_MODE_FILTER");
    assert_eq!(call("seccomp", [2, 0, 0, 0, 0, 0]), RETURN_ALLOW, "SECCOMP_GET_ACTION_AVAIL");
    for option in [26, 50, 51, 52] {
        assert_eq!(call("setsockopt", [0, 1, option, 0, 0, 0]), denied, "socket option {option}");
        assert_eq!(call("setsockopt", [0, 6, option, 0, 0, 0]), RETURN_ALLOW, "TCP option {option}");
    }
    assert_eq!(call("setsockopt", [0, 1, 2, 0, 0, 0]), RETURN_ALLOW, "SO_REUSEADDR");
    assert_eq!(call("mknodat", [0, 0, 0o10644, 0, 0, 0]), RETURN_ALLOW, "a FIFO");
    assert_eq!(call("mknodat", [0, 0, 0o20644, 0, 0, 0]), denied, "a device");
    assert_eq!(call("mknodat", [0, 0o10644, 0o60644, 0, 0, 0]), denied, "a device, mode third");
}

#[test]
fn a_bad_policy_says_what_is_wrong() {
    let policy = |rest: &str| {
        let text = format!("[[family]]\nname = \"a\"\nreason = \"b\"\n{rest}");
        Policy::parse(&text).and_then(|policy| policy.actions()).expect_err("wrong").to_string()
    };
    assert!(policy("allow = \"read read\"").contains("`read` is named twice"));
    assert!(policy("forbid = \"write\"").contains("forbid"));
    assert!(policy("[[family.when]]\nrule = \"tuesday\"\ncalls = \"clone\"").contains("tuesday"));
    assert!(Policy::parse("[[family]]\nname = \"a\"").is_err(), "no reason");
}

#[test]
fn the_document_says_what_the_policies_say() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs/system-calls.md");
    let text = format!(
        "# System calls\n\nGenerated from the policies in crates/sandbox/src/seccomp by `cargo xtask schema`; do not edit.\n\
         What is not named is answered as if this kernel did not have it (ENOSYS), as are the calls of other machines\n\
         (i386, x32). Only what is refused with EPERM counts as refused for jobs that ask for `report` or `kill`.\n{}",
        describe().expect("policies")
    );
    if std::env::var_os("HUTCH_UPDATE_SCHEMAS").is_some() {
        std::fs::write(path, &text).expect("write");
    }
    let there = std::fs::read_to_string(path).unwrap_or_default();
    assert!(there == text, "docs/system-calls.md is out of date: run `cargo xtask schema`");
}
