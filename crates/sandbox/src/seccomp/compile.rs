//! From actions to a filter: numbers with the same action become ranges; the ranges become a balanced tree of
//! comparisons, so that a call is decided in about eight instructions, and installing the filter costs little (the kernel
//! checks every instruction of it at each install).

use std::collections::BTreeMap;

use hutch_sandbox_sys::bpf::Instruction;

use super::policy::{Action, EPERM, PolicyError};

const ENOSYS: u32 = libc::ENOSYS.unsigned_abs();

/// `AUDIT_ARCH_*` of linux/audit.h for this machine.
#[cfg(target_arch = "x86_64")]
pub(super) const NATIVE_ARCH: u32 = 0xC000_003E;
#[cfg(target_arch = "aarch64")]
pub(super) const NATIVE_ARCH: u32 = 0xC000_00B7;

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
pub(super) const LOAD_WORD: u16 = 0x20;
pub(super) const AND: u16 = 0x54;
pub(super) const JUMP_EQUAL: u16 = 0x15;
pub(super) const JUMP_AT_LEAST: u16 = 0x35;
pub(super) const RETURN: u16 = 0x06;
// `struct seccomp_data`: number, architecture, instruction pointer, six arguments.
const AT_NUMBER: u32 = 0;
const AT_ARCH: u32 = 4;
pub(super) const RETURN_ALLOW: u32 = 0x7fff_0000;
pub(super) const RETURN_ERRNO: u32 = 0x0005_0000;
pub(super) const RETURN_NOTIFY: u32 = 0x7fc0_0000;

pub(super) const fn op(code: u16, operand: u32) -> Instruction {
    Instruction { code, jump_true: 0, jump_false: 0, operand }
}

pub(super) const fn branch(code: u16, operand: u32, jump_true: u8, jump_false: u8) -> Instruction {
    Instruction { code, jump_true, jump_false, operand }
}

pub(super) const fn errno(errno: u32) -> Instruction {
    op(RETURN, RETURN_ERRNO | errno)
}

pub(super) const ALLOW: Instruction = op(RETURN, RETURN_ALLOW);

/// A filter that takes these actions. `start_key` is what [`Rule::StartedByTheSandbox`] looks for.
///
/// [`Rule::StartedByTheSandbox`]: super::rules::Rule::StartedByTheSandbox
pub(super) fn compile(
    actions: &BTreeMap<u32, Action>,
    start_key: [u64; 2],
) -> Result<Vec<Instruction>, PolicyError> {
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
    program.finish(start_key)
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
    fn finish(mut self, start_key: [u64; 2]) -> Result<Vec<Instruction>, PolicyError> {
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
                        Action::When(rule) => self.code.extend(rule.instructions(start_key)),
                    }
                    block
                }
            };
            let too_long = |_| PolicyError("the filter is too long for its jumps".to_owned());
            let distance = u8::try_from(block - at - 1).map_err(too_long)?;
            match outcome {
                true => self.code[at].jump_true = distance,
                false => self.code[at].jump_false = distance,
            }
        }
        Ok(self.code)
    }
}

/// The same filter, but each refusal (EPERM) is told to whoever listens, and waits for the answer:
/// SECCOMP_RET_USER_NOTIF. What is answered as if this kernel did not have it is no refusal.
pub(super) fn telling(mut filter: Vec<Instruction>) -> Vec<Instruction> {
    for instruction in &mut filter {
        if *instruction == errno(EPERM) {
            instruction.operand = RETURN_NOTIFY;
        }
    }
    filter
}
