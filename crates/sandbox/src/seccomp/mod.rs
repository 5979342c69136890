//! The system call policy: a readable file, compiled once to a balanced tree of ranges.
//!
//! In order: the policy's lines become one action for each system call number; numbers with the
//! same action become ranges; the ranges become a tree of comparisons, so that a call is decided in about eight
//! instructions, and installing the filter costs little (the kernel checks every instruction of it
//! at each install). See seccomp(2) and Documentation/userspace-api/seccomp_filter.rst.

use std::collections::BTreeMap;

use hutch_sandbox_sys::bpf::Instruction;
use syscalls::Sysno;

const DEFAULT: &str = include_str!("default.policy");

const EPERM: u32 = libc::EPERM.unsigned_abs();
const ENOSYS: u32 = libc::ENOSYS.unsigned_abs();
const EINVAL: u32 = libc::EINVAL.unsigned_abs();
const EAFNOSUPPORT: u32 = libc::EAFNOSUPPORT.unsigned_abs();

/// `AUDIT_ARCH_*` of linux/audit.h for this machine.
#[cfg(target_arch = "x86_64")]
const NATIVE_ARCH: u32 = 0xC000_003E;
#[cfg(target_arch = "aarch64")]
const NATIVE_ARCH: u32 = 0xC000_00B7;

/// What is done with a system call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Action {
    Allow,
    Errno(u32),
    When(Rule),
}

/// A condition on the arguments. All compare the low 32 bits: what the kernel looks at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Rule {
    NoNewNamespaces,
    DefaultPersonality,
    CommonFamilies,
    NoTerminalInjection,
    NoDevices,
    NoSystemCallFilters,
    AsksOfFilters,
    NoSocketFilters,
}

impl Rule {
    fn named(name: &str) -> Option<Self> {
        Some(match name {
            "no-new-namespaces" => Self::NoNewNamespaces,
            "the-default-one" => Self::DefaultPersonality,
            "unix-inet-or-inet6" => Self::CommonFamilies,
            "not-terminal-injection" => Self::NoTerminalInjection,
            "a-fifo-a-socket-or-a-file" => Self::NoDevices,
            "not-a-system-call-filter" => Self::NoSystemCallFilters,
            "it-only-asks" => Self::AsksOfFilters,
            "not-a-socket-filter" => Self::NoSocketFilters,
            _ => return None,
        })
    }
}

/// A policy that cannot be compiled; a fault in the file that ships with the program.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("seccomp policy, line {line}: {message}")]
pub struct PolicyError {
    line: usize,
    message: String,
}

/// The default policy as a filter.
///
/// # Errors
/// Never for the policy that is built in; a test holds that.
pub fn default_filter() -> Result<Vec<Instruction>, PolicyError> {
    compile(&parse(DEFAULT)?)
}

/// One action for each system call that the policy names and this machine has.
fn parse(policy: &str) -> Result<BTreeMap<u32, Action>, PolicyError> {
    let mut actions = BTreeMap::new();
    for (index, text) in policy.lines().enumerate() {
        let failed = |message: String| PolicyError { line: index + 1, message };
        let line = text.split('#').next().unwrap_or_default().trim();
        let Some((verb, rest)) = line.split_once(' ') else {
            if line.is_empty() {
                continue;
            }
            return Err(failed(format!("`{line}` is not a rule")));
        };
        let (names, rule) = rest.split_once(" when ").unwrap_or((rest, ""));
        let action = match (verb, rule) {
            ("allow", "") => Action::Allow,
            ("deny", "") => Action::Errno(EPERM),
            ("allow", rule) => {
                Action::When(Rule::named(rule.trim()).ok_or_else(|| failed(format!("no rule `{rule}`")))?)
            }
            _ => return Err(failed(format!("`{verb}` is neither `allow` nor `deny`"))),
        };
        for name in names.split_whitespace() {
            // Some calls exist on other machines only.
            let Ok(number) = name.parse::<Sysno>() else { continue };
            let number = u32::try_from(number.id()).unwrap_or(u32::MAX);
            if actions.insert(number, action).is_some() {
                return Err(failed(format!("`{name}` is named twice")));
            }
        }
    }
    Ok(actions)
}

/// Runs of numbers with one action: where each begins, ascending from 0.
fn ranges(actions: &BTreeMap<u32, Action>) -> Vec<(u32, Action)> {
    let absent = Action::Errno(ENOSYS);
    let mut ranges = vec![(0, absent)];
    let mut push = |start: u32, action: Action| match ranges.last_mut() {
        Some(last) if last.1 == action => {}
        Some(last) if last.0 == start => last.1 = action,
        _ => ranges.push((start, action)),
    };
    for (number, action) in actions {
        push(*number, *action);
        if !actions.contains_key(&(number + 1)) {
            push(number + 1, absent);
        }
    }
    ranges
}

// Opcodes of linux/bpf_common.h.
const LOAD_WORD: u16 = 0x20;
const AND: u16 = 0x54;
const JUMP_EQUAL: u16 = 0x15;
const JUMP_AT_LEAST: u16 = 0x35;
const RETURN: u16 = 0x06;
// `struct seccomp_data`: number, architecture, instruction pointer, six arguments.
const AT_NUMBER: u32 = 0;
const AT_ARCH: u32 = 4;
const RETURN_ALLOW: u32 = 0x7fff_0000;
const RETURN_ERRNO: u32 = 0x0005_0000;

/// Where the low half of an argument lies, on a little-endian machine.
const fn at_argument(index: u32) -> u32 {
    16 + 8 * index
}

const fn op(code: u16, operand: u32) -> Instruction {
    Instruction { code, jump_true: 0, jump_false: 0, operand }
}

const fn branch(code: u16, operand: u32, jump_true: u8, jump_false: u8) -> Instruction {
    Instruction { code, jump_true, jump_false, operand }
}

const fn errno(errno: u32) -> Instruction {
    op(RETURN, RETURN_ERRNO | errno)
}

const ALLOW: Instruction = op(RETURN, RETURN_ALLOW);

fn compile(actions: &BTreeMap<u32, Action>) -> Result<Vec<Instruction>, PolicyError> {
    let mut program = Program {
        code: vec![
            op(LOAD_WORD, AT_ARCH),
            branch(JUMP_EQUAL, NATIVE_ARCH, 1, 0),
            errno(ENOSYS),
            op(LOAD_WORD, AT_NUMBER),
        ],
        jumps: Vec::new(),
    };
    program.tree(&ranges(actions));
    program.finish()
}

/// A filter that is being written: comparisons first, then one block for each action, to which they jump.
struct Program {
    code: Vec<Instruction>,
    /// Comparisons that go to an action: where they are, on which outcome, and which action.
    jumps: Vec<(usize, bool, Action)>,
}

impl Program {
    /// A balanced tree over two ascending ranges or more.
    fn tree(&mut self, ranges: &[(u32, Action)]) {
        let (left, right) = ranges.split_at(ranges.len() / 2);
        let at = self.code.len();
        self.code.push(branch(JUMP_AT_LEAST, right[0].0, 0, 0));
        match left {
            [(_, action)] => self.jumps.push((at, false, *action)),
            more => self.tree(more),
        }
        match right {
            [(_, action)] => self.jumps.push((at, true, *action)),
            more => {
                self.code[at].jump_true = u8::try_from(self.code.len() - at - 1).unwrap_or(u8::MAX);
                self.tree(more);
            }
        }
    }

    /// Writes the actions' blocks, and sets the jumps to them.
    fn finish(mut self) -> Result<Vec<Instruction>, PolicyError> {
        let mut blocks: Vec<(Action, usize)> = Vec::new();
        for (at, outcome, action) in self.jumps {
            let block = match blocks.iter().find(|(known, _)| *known == action) {
                Some((_, block)) => *block,
                None => {
                    let block = self.code.len();
                    blocks.push((action, block));
                    match action {
                        Action::Allow => self.code.push(ALLOW),
                        Action::Errno(number) => self.code.push(errno(number)),
                        Action::When(rule) => self.code.extend(when(rule)),
                    }
                    block
                }
            };
            let too_long =
                |_| PolicyError { line: 0, message: "the filter is too long for its jumps".to_owned() };
            let distance = u8::try_from(block - at - 1).map_err(too_long)?;
            match outcome {
                true => self.code[at].jump_true = distance,
                false => self.code[at].jump_false = distance,
            }
        }
        Ok(self.code)
    }
}

fn when(rule: Rule) -> Vec<Instruction> {
    // CLONE_NEW* of sched.h; CLONE_NEWTIME shares its bit with the exit signal and needs clone3.
    const NAMESPACES: u32 = 0x7E02_0000;
    match rule {
        Rule::NoNewNamespaces => vec![
            op(LOAD_WORD, at_argument(0)),
            op(AND, NAMESPACES),
            branch(JUMP_EQUAL, 0, 0, 1),
            ALLOW,
            errno(EPERM),
        ],
        Rule::DefaultPersonality => one_of(0, None, &[0, u32::MAX], EPERM),
        Rule::CommonFamilies => {
            let families = [libc::AF_UNIX, libc::AF_INET, libc::AF_INET6].map(i32::unsigned_abs);
            one_of(0, None, &families, EAFNOSUPPORT)
        }
        Rule::NoTerminalInjection => {
            const TIOCSTI: u32 = 0x5412;
            const TIOCLINUX: u32 = 0x541C;
            vec![
                op(LOAD_WORD, at_argument(1)),
                branch(JUMP_EQUAL, TIOCSTI, 2, 0),
                branch(JUMP_EQUAL, TIOCLINUX, 1, 0),
                ALLOW,
                errno(EPERM),
            ]
        }
        // mknod has the mode second, mknodat third: a rule for both would have to know which; devices
        // are refused by the kernel anyway, so the pair is told apart by the number.
        Rule::NoDevices => mknod_rule(),
        Rule::NoSystemCallFilters => {
            let set_seccomp = libc::PR_SET_SECCOMP.unsigned_abs();
            vec![op(LOAD_WORD, at_argument(0)), branch(JUMP_EQUAL, set_seccomp, 1, 0), ALLOW, errno(EINVAL)]
        }
        Rule::AsksOfFilters => {
            one_of(0, None, &[libc::SECCOMP_GET_ACTION_AVAIL, libc::SECCOMP_GET_NOTIF_SIZES], EINVAL)
        }
        Rule::NoSocketFilters => socket_filter_rule(),
    }
}

/// Refuses to attach a program to a socket: setsockopt(2) with SOL_SOCKET and any of these.
fn socket_filter_rule() -> Vec<Instruction> {
    // SO_ATTACH_FILTER, SO_ATTACH_BPF, SO_ATTACH_REUSEPORT_CBPF, SO_ATTACH_REUSEPORT_EBPF of asm-generic/socket.h.
    const FILTERS: [u32; 4] = [26, 50, 51, 52];
    let level = libc::SOL_SOCKET.unsigned_abs();
    let mut program = vec![
        op(LOAD_WORD, at_argument(1)),
        branch(JUMP_EQUAL, level, 1, 0),
        ALLOW,
        op(LOAD_WORD, at_argument(2)),
    ];
    for (left, option) in (1..=4).rev().zip(FILTERS) {
        program.push(branch(JUMP_EQUAL, option, left, 0));
    }
    program.extend([ALLOW, errno(EPERM)]);
    program
}

/// Allows if the argument, masked, is one of these.
fn one_of(argument: u32, mask: Option<u32>, values: &[u32], otherwise: u32) -> Vec<Instruction> {
    let mut program = vec![op(LOAD_WORD, at_argument(argument))];
    program.extend(mask.map(|mask| op(AND, mask)));
    for (index, value) in values.iter().enumerate() {
        let left = u8::try_from(values.len() - index).unwrap_or(u8::MAX);
        program.push(branch(JUMP_EQUAL, *value, left, 0));
    }
    program.push(errno(otherwise));
    program.push(ALLOW);
    program
}

fn mknod_rule() -> Vec<Instruction> {
    let kinds = [0, libc::S_IFREG, libc::S_IFIFO, libc::S_IFSOCK];
    let at_second = one_of(1, Some(libc::S_IFMT), &kinds, EPERM);
    let at_third = one_of(2, Some(libc::S_IFMT), &kinds, EPERM);
    let number = u32::try_from(Sysno::mknodat.id()).unwrap_or(u32::MAX);
    let skip = u8::try_from(at_second.len()).unwrap_or(u8::MAX);
    let mut program = vec![branch(JUMP_EQUAL, number, skip, 0)];
    program.extend(at_second);
    program.extend(at_third);
    program
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Runs a filter as the kernel would.
    fn run(filter: &[Instruction], arch: u32, number: u32, arguments: [u64; 6]) -> u32 {
        let mut data = Vec::new();
        data.extend(number.to_le_bytes());
        data.extend(arch.to_le_bytes());
        data.extend([0; 8]);
        data.extend(arguments.iter().flat_map(|argument| argument.to_le_bytes()));
        let (mut at, mut accumulator) = (0_usize, 0_u32);
        loop {
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
                RETURN => return k,
                code => panic!("opcode {code:#x}"),
            }
        }
    }

    fn call(name: &str, arguments: [u64; 6]) -> u32 {
        let filter = default_filter().expect("policy");
        let number = name.parse::<Sysno>().expect(name).id();
        run(&filter, NATIVE_ARCH, u32::try_from(number).expect("number"), arguments)
    }

    #[test]
    fn every_number_gets_the_action_of_the_policy() {
        let actions = parse(DEFAULT).expect("policy");
        let filter = compile(&actions).expect("short");
        for number in (0..2000).chain([0x4000_0000, 0x4000_0001, u32::MAX]) {
            let wanted = match actions.get(&number) {
                Some(Action::Allow) => RETURN_ALLOW,
                Some(Action::Errno(errno)) => RETURN_ERRNO | errno,
                Some(Action::When(_)) => continue,
                None => RETURN_ERRNO | ENOSYS,
            };
            assert_eq!(run(&filter, NATIVE_ARCH, number, [0; 6]), wanted, "number {number}");
        }
        assert!(filter.len() < 200, "{} instructions", filter.len());
    }

    #[test]
    fn every_name_is_a_system_call_somewhere() {
        let elsewhere = "_llseek fcntl64 sendfile64 _newselect waitpid sigreturn mmap2 send recv stime open_tree_attr \
                         epoll_ctl_old epoll_wait_old set_mempolicy_home_node";
        for line in DEFAULT.lines().filter(|line| line.starts_with("allow ") || line.starts_with("deny ")) {
            let names = line.split_once(" when ").map_or(line, |(names, _)| names);
            for name in names.split_whitespace().skip(1) {
                let known = name.parse::<Sysno>().is_ok() || elsewhere.split_whitespace().any(|e| e == name);
                assert!(known || cfg!(not(target_arch = "x86_64")), "`{name}` is no system call");
            }
        }
    }

    #[test]
    fn other_architectures_are_refused() {
        let filter = default_filter().expect("policy");
        for arch in [0x4000_0003, 0, u32::MAX] {
            assert_eq!(run(&filter, arch, 0, [0; 6]), RETURN_ERRNO | ENOSYS);
        }
    }

    #[test]
    fn arguments_are_looked_at() {
        let denied = RETURN_ERRNO | EPERM;
        assert_eq!(call("clone", [0x0001_2011, 0, 0, 0, 0, 0]), RETURN_ALLOW);
        for flag in
            [0x0002_0000, 0x0200_0000, 0x0400_0000, 0x0800_0000, 0x1000_0000, 0x2000_0000, 0x4000_0000]
        {
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
    fn a_bad_policy_names_its_line() {
        assert_eq!(parse("allow read\nforbid write").expect_err("verb").line, 2);
        assert_eq!(parse("allow read read").expect_err("twice").message, "`read` is named twice");
        assert_eq!(parse("allow clone when tuesday").expect_err("rule").line, 1);
    }
}
