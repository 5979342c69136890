//! The mounts of a sandbox as steps for its init, in order: layers and scratch are attached in the
//! launcher's small root, the overlays are stacked, then devices, volumes, /proc, and the pivot.

use std::ffi::CString;

use hutch_sandbox_sys::{FdIndex, Step, Text, mount};

/// What the mounts of a job are made of, by count and place.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct MountPlan {
    /// How many layers, the host's skeleton among them.
    pub(crate) layers: usize,
    /// Trees of the host, when it is the bottom layer: path, and which layers above have it too (base first).
    pub(crate) trees: Vec<(String, Vec<usize>)>,
    /// Where volumes go.
    pub(crate) targets: Vec<String>,
}

/// Where in a plan's list of descriptors the mounts are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Slots {
    /// The first layer; the others, then the trees, follow.
    pub(crate) layers: FdIndex,
    /// The scratch file system.
    pub(crate) scratch: FdIndex,
    /// The first volume; the others follow.
    pub(crate) volumes: FdIndex,
}

/// The upper and work directories of the root overlay (0) and of each tree's (1, 2, …), below the scratch.
pub(crate) fn scratch_dirs(overlay: usize) -> (String, String) {
    (format!("o{overlay}/upper"), format!("o{overlay}/work"))
}

fn path(text: String) -> Text {
    // The texts are made here, of paths that were checked: none has a NUL.
    CString::new(text).unwrap_or_default().into()
}

fn overlay(number: usize, lowers: Vec<String>, target: &str) -> Step {
    let (upper, work) = scratch_dirs(number);
    Step::Overlay {
        lowers: lowers.into_iter().map(path).collect(),
        upper: path(format!("/s/{upper}")),
        work: path(format!("/s/{work}")),
        target: path(target.to_owned()),
    }
}

/// The steps, in order. `last` if no other program of the job needs the scratch file system after this one.
pub(crate) fn steps(plan: &MountPlan, slots: Slots, last: bool) -> Vec<Step> {
    let index =
        |first: FdIndex, offset: usize| first + FdIndex::try_from(offset).unwrap_or(FdIndex::MAX - first);
    let mut steps = Vec::new();
    for place in 0..plan.layers + plan.trees.len() {
        steps.push(Step::Attach { mount: index(slots.layers, place), target: path(format!("/l/{place}")) });
    }
    steps.push(Step::Attach { mount: slots.scratch, target: c"/s".into() });
    if !last {
        steps.push(Step::HandBack { source: c"/s".into() });
    }
    steps.push(overlay(0, (0..plan.layers).rev().map(|layer| format!("/l/{layer}")).collect(), "/n"));
    for (number, (tree, above)) in plan.trees.iter().enumerate() {
        let mut lowers: Vec<_> = above.iter().rev().map(|layer| format!("/l/{layer}{tree}")).collect();
        lowers.push(format!("/l/{}", plan.layers + number));
        steps.push(overlay(number + 1, lowers, tree));
    }
    steps.push(Step::Devices);
    steps.push(Step::Bind {
        source: c"/s/shm".into(),
        inside: c"/dev/shm".into(),
        attributes: mount::NOSUID | mount::NODEV | mount::NOEXEC,
    });
    steps.push(Step::Directory { inside: c"/tmp".into(), mode: 0o1777 });
    for (number, target) in plan.targets.iter().enumerate() {
        steps.push(Step::Volume {
            mount: index(slots.volumes, number),
            inside: path(target.clone()),
            index: u32::try_from(number).unwrap_or(u32::MAX),
        });
    }
    steps.push(Step::Proc);
    steps.push(Step::Pivot);
    steps
}
