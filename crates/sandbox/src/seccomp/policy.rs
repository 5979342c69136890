//! From a policy's file to one action for each system call number.

use std::collections::BTreeMap;

use serde::Deserialize;
use syscalls::Sysno;

use super::rules::Rule;

pub(super) const EPERM: u32 = libc::EPERM.unsigned_abs();

/// What is done with a system call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Action {
    Allow,
    Errno(u32),
    When(Rule),
}

/// A policy that cannot be compiled; a fault in the files that ship with the program.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("seccomp policy: {0}")]
pub struct PolicyError(pub(super) String);

/// A policy as its file has it.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Policy {
    pub(super) family: Vec<Family>,
}

/// System calls that are treated for one reason.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Family {
    pub(super) name: String,
    pub(super) reason: String,
    #[serde(default)]
    pub(super) allow: String,
    #[serde(default)]
    pub(super) deny: String,
    #[serde(default)]
    pub(super) when: Vec<When>,
}

/// System calls whose arguments decide.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct When {
    pub(super) rule: Rule,
    pub(super) calls: String,
}

impl Policy {
    pub(super) fn parse(text: &str) -> Result<Self, PolicyError> {
        toml::from_str(text).map_err(|error| PolicyError(error.to_string()))
    }

    /// Every call that is named, and what is done with it, in the file's order.
    pub(super) fn entries(&self) -> impl Iterator<Item = (&str, Action)> {
        let named = |names, action| str::split_whitespace(names).map(move |name| (name, action));
        self.family.iter().flat_map(move |family| {
            named(&family.allow, Action::Allow)
                .chain(named(&family.deny, Action::Errno(EPERM)))
                .chain(family.when.iter().flat_map(move |when| named(&when.calls, Action::When(when.rule))))
        })
    }

    /// One action for each call that the policy names and this machine has.
    pub(super) fn actions(&self) -> Result<BTreeMap<u32, Action>, PolicyError> {
        let mut actions = BTreeMap::new();
        for (name, action) in self.entries() {
            // Some calls exist on other machines only.
            let Some(number) = number(name) else { continue };
            if actions.insert(number, action).is_some() {
                return Err(PolicyError(format!("`{name}` is named twice")));
            }
        }
        Ok(actions)
    }
}

/// A call's number on this machine.
pub(super) fn number(name: &str) -> Option<u32> {
    name.parse::<Sysno>().ok().and_then(|call| u32::try_from(call.id()).ok())
}

/// A call's name, by its number on this machine; the number where there is none.
pub(crate) fn name(number: i32) -> String {
    let known = usize::try_from(number).ok().and_then(Sysno::new);
    known.map_or_else(|| number.to_string(), |call| call.name().to_owned())
}
