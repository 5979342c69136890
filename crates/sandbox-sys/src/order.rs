//! A plan as the child reads it: borrowed from the bytes that came, without memory of its own.
//!
//! The types here mirror those of [`plan`](crate::plan), field by field; a test holds them together. What
//! came is not trusted to be well-formed: whatever does not parse is EBADMSG.

use core::marker::PhantomData;
use std::ffi::CStr;

use serde::{Deserialize, Deserializer};

use crate::plan::{FdIndex, IdRange, Rlimit, WindowSize};
use crate::{Errno, Result};

/// A text with its NUL.
#[derive(Debug, Clone, Copy, Deserialize)]
pub(crate) struct TextRef<'a>(#[serde(borrow)] &'a [u8]);

impl<'a> TextRef<'a> {
    /// The text; EBADMSG if it does not end with its only NUL.
    pub(crate) fn get(self) -> Result<&'a CStr> {
        CStr::from_bytes_with_nul(self.0).map_err(|_| Errno::EBADMSG)
    }
}

/// Items one after another.
#[derive(Debug)]
pub(crate) struct List<'a, T> {
    bytes: &'a [u8],
    item: PhantomData<T>,
}

impl<T> Clone for List<'_, T> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<T> Copy for List<'_, T> {}

impl<'a, 'de: 'a, T> Deserialize<'de> for List<'a, T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> core::result::Result<Self, D::Error> {
        Ok(Self { bytes: <&[u8]>::deserialize(deserializer)?, item: PhantomData })
    }
}

impl<'a, T: Deserialize<'a>> Iterator for List<'a, T> {
    type Item = Result<T>;

    fn next(&mut self) -> Option<Result<T>> {
        if self.bytes.is_empty() {
            return None;
        }
        match postcard::take_from_bytes(self.bytes) {
            Ok((item, rest)) => {
                self.bytes = rest;
                Some(Ok(item))
            }
            Err(_) => {
                self.bytes = &[];
                Some(Err(Errno::EBADMSG))
            }
        }
    }
}

/// How a sandbox's file system is built.
#[derive(Debug, Clone, Copy, Deserialize)]
pub(crate) struct RootOrder<'a> {
    #[serde(borrow)]
    pub(crate) steps: List<'a, StepRef<'a>>,
}

impl<'a> RootOrder<'a> {
    /// Reads an order.
    pub(crate) fn parse(bytes: &'a [u8]) -> Result<Self> {
        postcard::from_bytes(bytes).map_err(|_| Errno::EBADMSG)
    }
}

/// Everything about one program in one sandbox.
#[derive(Debug, Clone, Copy, Deserialize)]
pub(crate) struct Order<'a> {
    #[serde(borrow)]
    pub(crate) hostname: &'a str,
    pub(crate) report: FdIndex,
    pub(crate) network: Option<FdIndex>,
    pub(crate) ids: IdRange,
    #[serde(borrow)]
    pub(crate) program: ProgramRef<'a>,
}

impl<'a> Order<'a> {
    /// Reads an order.
    pub(crate) fn parse(bytes: &'a [u8]) -> Result<Self> {
        postcard::from_bytes(bytes).map_err(|_| Errno::EBADMSG)
    }
}

/// One step.
#[derive(Debug, Clone, Copy, Deserialize)]
pub(crate) enum StepRef<'a> {
    Attach {
        mount: FdIndex,
        #[serde(borrow)]
        target: TextRef<'a>,
    },
    HandBack {
        #[serde(borrow)]
        source: TextRef<'a>,
    },
    Overlay {
        #[serde(borrow)]
        lowers: List<'a, TextRef<'a>>,
        #[serde(borrow)]
        upper: TextRef<'a>,
        #[serde(borrow)]
        work: TextRef<'a>,
        #[serde(borrow)]
        target: TextRef<'a>,
    },
    Directory {
        #[serde(borrow)]
        inside: TextRef<'a>,
        mode: u32,
    },
    Devices,
    Volume {
        mount: FdIndex,
        #[serde(borrow)]
        inside: TextRef<'a>,
        index: u32,
    },
    Bind {
        #[serde(borrow)]
        source: TextRef<'a>,
        #[serde(borrow)]
        inside: TextRef<'a>,
        attributes: u64,
    },
    Proc,
    Pivot,
}

/// The program.
#[derive(Debug, Clone, Copy, Deserialize)]
pub(crate) struct ProgramRef<'a> {
    #[serde(borrow)]
    pub(crate) cgroup: CgroupRef<'a>,
    #[serde(borrow)]
    pub(crate) user: &'a str,
    #[serde(borrow)]
    pub(crate) group: Option<&'a str>,
    #[serde(borrow)]
    pub(crate) files: List<'a, FileRef<'a>>,
    pub(crate) payload: Option<FdIndex>,
    #[serde(borrow)]
    pub(crate) cwd: Option<TextRef<'a>>,
    #[serde(borrow)]
    pub(crate) argv: List<'a, TextRef<'a>>,
    #[serde(borrow)]
    pub(crate) candidates: List<'a, TextRef<'a>>,
    #[serde(borrow)]
    pub(crate) env: List<'a, TextRef<'a>>,
    pub(crate) set_home: bool,
    pub(crate) set_user: bool,
    #[serde(borrow)]
    pub(crate) rlimits: List<'a, Rlimit>,
    pub(crate) stdin: Option<FdIndex>,
    pub(crate) outputs: [FdIndex; 2],
    pub(crate) terminal: Option<WindowSize>,
    pub(crate) filter: u8,
    pub(crate) listener: Option<FdIndex>,
}

/// How the program enters its cgroup.
#[derive(Debug, Clone, Copy, Deserialize)]
pub(crate) enum CgroupRef<'a> {
    Tasks(#[serde(borrow)] List<'a, FdIndex>),
    Unified(FdIndex, #[serde(borrow)] List<'a, FdIndex>),
}

/// A file that is written before the start.
#[derive(Debug, Clone, Copy, Deserialize)]
pub(crate) struct FileRef<'a> {
    #[serde(borrow)]
    pub(crate) path: TextRef<'a>,
    pub(crate) offset: u64,
    pub(crate) length: u64,
    pub(crate) mode: u32,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::{FileWrite, Plan, Program, ProgramCgroup, RootPlan, Step};

    fn root_plan() -> RootPlan {
        RootPlan {
            steps: vec![
                Step::Attach { mount: 300, target: c"/l/0".into() },
                Step::Overlay {
                    lowers: vec![c"/l/1".into(), c"/l/0".into()],
                    upper: c"/u".into(),
                    work: c"/w".into(),
                    target: c"/n".into(),
                },
                Step::Directory { inside: c"/tmp".into(), mode: 0o1777 },
                Step::Devices,
                Step::Volume { mount: 3, inside: c"/v".into(), index: 2 },
                Step::Bind { source: c"/s".into(), inside: c"/dev/shm".into(), attributes: 14 },
                Step::Proc,
                Step::HandBack { source: c"/s".into() },
                Step::Pivot,
            ],
        }
    }

    fn plan() -> Plan {
        Plan {
            hostname: "host".to_owned(),
            report: 7,
            network: Some(9),
            ids: IdRange { base: 805_306_368, count: 65_536 },
            program: Program {
                cgroup: ProgramCgroup::Unified(9, vec![1, 2]),
                user: "ann".to_owned(),
                group: Some("staff".to_owned()),
                files: vec![FileWrite { path: c"/f".into(), offset: 1 << 40, length: 5, mode: 0o644 }],
                payload: Some(4),
                cwd: Some(c"/box".into()),
                argv: vec![c"a".into(), c"".into()],
                candidates: vec![c"/bin/a".into()],
                env: vec![c"A=b".into()],
                set_home: true,
                set_user: false,
                rlimits: vec![Rlimit { resource: 7, soft: u64::MAX, hard: 1 }],
                stdin: Some(1),
                outputs: [2, 3],
                terminal: Some(WindowSize { rows: 24, columns: 80 }),
                filter: 3,
                listener: Some(5),
            },
        }
    }

    fn texts(list: List<'_, TextRef<'_>>) -> Vec<String> {
        list.map(|text| text.and_then(TextRef::get).expect("text").to_string_lossy().into_owned()).collect()
    }

    #[test]
    fn a_plan_is_read_as_it_was_written() {
        let root_bytes = postcard::to_stdvec(&root_plan()).expect("bytes");
        let root = RootOrder::parse(&root_bytes).expect("order");
        let bytes = postcard::to_stdvec(&plan()).expect("bytes");
        let order = Order::parse(&bytes).expect("order");
        assert_eq!((order.hostname, order.report, order.ids), ("host", 7, plan().ids));
        // The two mirror each other: what is shown of each step is the same but for the types' names.
        let steps: Vec<_> = root.steps.collect::<Result<_>>().expect("steps");
        assert_eq!(steps.len(), root_plan().steps.len());
        let StepRef::Overlay { lowers, target, .. } = steps[1] else { panic!("{:?}", steps[1]) };
        assert_eq!((texts(lowers), target.get()), (vec!["/l/1".to_owned(), "/l/0".to_owned()], Ok(c"/n")));
        assert!(matches!(steps[4], StepRef::Volume { mount: 3, index: 2, .. }));
        assert!(matches!(steps[5], StepRef::Bind { attributes: 14, .. }));
        let StepRef::HandBack { source } = steps[7] else { panic!("{:?}", steps[7]) };
        assert_eq!(source.get(), Ok(c"/s"));
        let program = order.program;
        let CgroupRef::Unified(9, tasks) = program.cgroup else { panic!("{:?}", program.cgroup) };
        assert_eq!(tasks.collect::<Result<Vec<_>>>(), Ok(vec![1, 2]));
        assert_eq!((program.user, program.group, program.payload), ("ann", Some("staff"), Some(4)));
        assert_eq!(program.cwd.map(TextRef::get), Some(Ok(c"/box")));
        assert_eq!(texts(program.argv), ["a", ""]);
        assert_eq!(texts(program.candidates), ["/bin/a"]);
        assert_eq!(texts(program.env), ["A=b"]);
        assert_eq!((program.set_home, program.set_user, program.stdin), (true, false, Some(1)));
        assert_eq!(program.outputs, [2, 3]);
        assert_eq!(program.terminal, plan().program.terminal);
        assert_eq!((program.filter, program.listener), (3, Some(5)));
        assert_eq!(program.rlimits.collect::<Result<Vec<_>>>(), Ok(plan().program.rlimits));
        let file = program.files.clone().next().expect("file").expect("file");
        assert_eq!((file.path.get(), file.offset, file.length, file.mode), (Ok(c"/f"), 1 << 40, 5, 0o644));
    }

    #[test]
    fn no_bytes_are_read_beyond_their_end() {
        let bytes = postcard::to_stdvec(&plan()).expect("bytes");
        for end in 0..bytes.len() {
            assert!(Order::parse(&bytes[..end]).is_err(), "cut at {end}");
        }
        for place in 0..bytes.len() {
            for value in [0, 1, 0x7f, 0x80, 0xff] {
                let mut damaged = bytes.clone();
                damaged[place] = value;
                if let Ok(order) = Order::parse(&damaged) {
                    order.program.argv.for_each(|text| {
                        let _ = text.and_then(TextRef::get);
                    });
                    order.program.files.for_each(drop);
                }
            }
        }
        let root = postcard::to_stdvec(&root_plan()).expect("bytes");
        for place in 0..root.len() {
            for value in [0, 1, 0x7f, 0x80, 0xff] {
                let mut damaged = root.clone();
                damaged[place] = value;
                if let Ok(order) = RootOrder::parse(&damaged) {
                    order.steps.for_each(drop);
                }
            }
        }
    }
}
