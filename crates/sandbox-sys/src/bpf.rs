//! Classic BPF as seccomp(2) runs it: the instruction, and nothing else.

use serde::{Deserialize, Serialize};

/// One instruction: `struct sock_filter` of linux/filter.h.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[repr(C)]
pub struct Instruction {
    /// Operation.
    pub code: u16,
    /// How many instructions to skip when a condition holds.
    pub jump_true: u8,
    /// How many to skip when it does not.
    pub jump_false: u8,
    /// Operand.
    pub operand: u32,
}
