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

/// The filters of which a program gets one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Filters {
    /// What a plan chooses from, by number.
    pub programs: Vec<Vec<Instruction>>,
    /// What the sandbox gives execve(2) as fourth and fifth argument when it starts the program, so that a filter can tell
    /// that from what the program starts.
    pub start_key: [u64; 2],
}
