//! One row of the table: a job, the verdict it must get, and what else must be true of its result.

use std::ops::RangeInclusive;

use hutch_proto::{Captured, JobResult, OutputKind, Reason, Status};
use serde_json::{Value, json};

use hutch_tests::programs::{self, Program};

/// A mebibyte.
pub(crate) const MIB: u64 = 1 << 20;
/// However much.
pub(crate) const ANY: RangeInclusive<u64> = 0..=u64::MAX;
/// At least one.
pub(crate) const SOME: RangeInclusive<u64> = 1..=u64::MAX;

/// A job in the making: the host layer, unless said otherwise.
#[derive(Debug, Clone)]
pub(crate) struct Spec(Value);

/// A shell's program.
pub(crate) fn sh(script: &str) -> Spec {
    argv(&["sh", "-c", script])
}

/// A python program.
pub(crate) fn py(script: &str) -> Spec {
    argv(&["python3", "-c", script])
}

/// A program with its arguments.
pub(crate) fn argv(command: &[&str]) -> Spec {
    Spec(json!({"layers": ["host"], "command": command}))
}

/// What `probe` of the tests' own programs does, told as words.
pub(crate) fn probe(arguments: &str) -> Spec {
    let path = programs::inside(Program::Probe);
    let words: Vec<&str> = std::iter::once(path.as_str()).chain(arguments.split(' ')).collect();
    argv(&words).with_programs()
}

/// A shell's program that finds `probe` at `$P`.
pub(crate) fn sh_probe(script: &str) -> Spec {
    sh(script).with_programs().set("env", json!({"P": programs::inside(Program::Probe)}))
}

/// Several steps.
pub(crate) fn steps(steps: Value) -> Spec {
    Spec(json!({"layers": ["host"], "steps": steps}))
}

impl Spec {
    /// Layers alone.
    pub(crate) fn bare(layers: &[&str]) -> Self {
        Self(json!({"layers": layers}))
    }

    /// Sets a field.
    pub(crate) fn set(mut self, name: &str, value: Value) -> Self {
        self.0[name] = value;
        self
    }

    /// Sets limits, in addition to those that are set.
    pub(crate) fn limits(mut self, limits: Value) -> Self {
        for (name, value) in limits.as_object().expect("limits") {
            self.0["limits"][name] = value.clone();
        }
        self
    }

    /// Adds a file.
    pub(crate) fn file(mut self, path: &str, text: &str, mode: &str) -> Self {
        let files = self.0["files"].as_array().cloned().unwrap_or_default();
        let file = json!({"path": path, "text": text, "mode": mode});
        self.0["files"] = [files, vec![file]].concat().into();
        self
    }

    /// Stacks the tests' own programs on top; the row is skipped where there are none.
    pub(crate) fn with_programs(mut self) -> Self {
        let layer = match programs::layer() {
            Some(dir) => json!(format!("dir:{}", dir.display())),
            None => Value::Null,
        };
        self.0["layers"].as_array_mut().expect("layers").push(layer);
        self
    }
}

/// Further questions to a result; the answer is what is wrong.
type Check = Box<dyn Fn(&JobResult) -> Result<(), String> + Send + Sync>;
/// Questions to the host, once the jobs are over.
type HostCheck = Box<dyn Fn() -> Result<(), String> + Send + Sync>;

/// One job and the verdict that it must get.
pub(crate) struct Job {
    pub(crate) spec: Value,
    status: Status,
    reason: Option<Reason>,
    exit_code: Option<i32>,
    signal: Option<String>,
    /// Whether exit code and signal are a matter of chance.
    any_end: bool,
    limit: Option<(&'static str, u64, RangeInclusive<u64>)>,
    checks: Vec<Check>,
}

/// A row: its jobs run one after another on one data directory.
pub(crate) struct Row {
    pub(crate) name: String,
    pub(crate) jobs: Vec<Job>,
    pub(crate) on_host: Vec<HostCheck>,
    /// Settings of the worker, as variables.
    pub(crate) env: Vec<(&'static str, &'static str)>,
    /// Whether the owners of the host's files must be mapped into the sandbox: its root then may change them.
    pub(crate) owns_host_files: bool,
}

/// A row that expects success, until told otherwise.
pub(crate) fn row(name: impl Into<String>, spec: Spec) -> Row {
    Row { name: name.into(), jobs: Vec::new(), on_host: Vec::new(), env: Vec::new(), owns_host_files: false }
        .then(spec)
}

impl Row {
    /// Needs a host whose files' owners can be mapped.
    pub(crate) fn owns_host_files(mut self) -> Self {
        self.owns_host_files = true;
        self
    }

    /// Another job, after the ones before it.
    pub(crate) fn then(mut self, Spec(spec): Spec) -> Self {
        self.jobs.push(Job {
            spec,
            status: Status::Succeeded,
            reason: None,
            exit_code: Some(0),
            signal: None,
            any_end: false,
            limit: None,
            checks: Vec::new(),
        });
        self
    }

    /// The worker has this setting.
    pub(crate) fn with_env(mut self, setting: (&'static str, &'static str)) -> Self {
        self.env.push(setting);
        self
    }

    fn last(&mut self) -> &mut Job {
        self.jobs.last_mut().expect("a job")
    }

    fn because(mut self, reason: Reason) -> Self {
        let job = self.last();
        (job.status, job.reason) = (reason.status(), Some(reason));
        (job.exit_code, job.signal) = (None, None);
        self
    }

    /// It exits with this code.
    pub(crate) fn exits(mut self, code: i32) -> Self {
        if code != 0 {
            self = self.because(Reason::NonzeroExit);
        }
        self.last().exit_code = Some(code);
        self
    }

    /// A signal ends it, and it is the program's own doing.
    pub(crate) fn dies(mut self, signal: &str) -> Self {
        self = self.because(Reason::Signal);
        self.last().signal = Some(signal.to_owned());
        self
    }

    /// A limit ends it, by SIGKILL.
    pub(crate) fn hits(
        mut self,
        reason: Reason,
        limit: &'static str,
        allowed: u64,
        measured: RangeInclusive<u64>,
    ) -> Self {
        self = self.because(reason);
        let job = self.last();
        job.limit = Some((limit, allowed, measured));
        job.signal = Some("SIGKILL".to_owned());
        self
    }

    /// The memory limit ends it; a kernel counts in batches of pages.
    pub(crate) fn out_of_memory(self, allowed: u64) -> Self {
        self.hits(Reason::Memory, "memory_bytes", allowed, allowed - 2 * MIB..=allowed + 2 * MIB)
            .usage("memory_peak_bytes", allowed - 2 * MIB..=allowed + 2 * MIB)
    }

    /// …but the program had ended by itself with this code.
    pub(crate) fn having_exited(mut self, code: i32) -> Self {
        let job = self.last();
        (job.exit_code, job.signal) = (Some(code), None);
        self
    }

    /// …but the program had ended by this signal.
    pub(crate) fn having_died(mut self, signal: &str) -> Self {
        let job = self.last();
        (job.exit_code, job.signal) = (None, Some(signal.to_owned()));
        self
    }

    /// …and the program may have been quicker than we.
    pub(crate) fn however_it_ended(mut self) -> Self {
        self.last().any_end = true;
        self
    }

    /// It does not run at all; the message has these words.
    pub(crate) fn refused(mut self, reason: Reason, words: &[&str]) -> Self {
        self = self.because(reason);
        for word in words {
            self = self.says(word);
        }
        self
    }

    /// The message has this word.
    pub(crate) fn says(self, word: &str) -> Self {
        let word = word.to_owned();
        self.check(move |result| {
            holds(result.message.contains(&word), || format!("the message lacks `{word}`"))
        })
    }

    /// It wrote exactly this to stdout.
    pub(crate) fn stdout(self, text: &str) -> Self {
        let text = text.to_owned();
        self.check(move |result| same("stdout", &self::text(&result.stdout), &text))
    }

    /// It wrote exactly this to stderr.
    pub(crate) fn stderr(self, text: &str) -> Self {
        let text = text.to_owned();
        self.check(move |result| same("stderr", &self::text(&result.stderr), &text))
    }

    /// This is somewhere in what it wrote to stdout.
    pub(crate) fn prints(self, text: &str) -> Self {
        let text = text.to_owned();
        self.check(move |result| {
            let stdout = String::from_utf8_lossy(&result.stdout.data);
            holds(stdout.contains(&text), || format!("stdout lacks `{text}`"))
        })
    }

    /// This is nowhere in what it wrote to stdout.
    pub(crate) fn never_prints(self, text: &str) -> Self {
        let text = text.to_owned();
        self.check(move |result| {
            let stdout = String::from_utf8_lossy(&result.stdout.data);
            holds(!stdout.contains(&text), || format!("stdout has `{text}`"))
        })
    }

    /// One of the figures of its usage.
    pub(crate) fn usage(self, figure: &'static str, bounds: RangeInclusive<u64>) -> Self {
        self.check(move |result| {
            let usage = serde_json::to_value(result.usage).map_err(|e| e.to_string())?;
            let value = usage[figure].as_u64().ok_or_else(|| format!("no usage.{figure}"))?;
            within(&format!("usage.{figure}"), value, &bounds)
        })
    }

    /// User and system time together, in milliseconds.
    pub(crate) fn cpu_ms(self, bounds: RangeInclusive<u64>) -> Self {
        self.check(move |result| {
            let value = result.usage.cpu_user_ms + result.usage.cpu_system_ms;
            within("processor time", value, &bounds)
        })
    }

    /// This path is among the outputs, of this kind.
    pub(crate) fn output(self, path: &'static str, kind: OutputKind) -> Self {
        self.check(move |result| {
            let found = result.outputs.files.iter().find(|file| file.path == path);
            let found = found.ok_or_else(|| format!("{path} is not among the outputs"))?;
            same(path, &found.kind, &kind)
        })
    }

    /// These paths are the outputs, and no others.
    pub(crate) fn outputs(self, paths: &'static [&'static str]) -> Self {
        self.check(move |result| {
            let found: Vec<_> = result.outputs.files.iter().map(|file| file.path.as_str()).collect();
            same("outputs", &found.as_slice(), &paths)
        })
    }

    /// The steps that ran: name, status, reason.
    pub(crate) fn ran(self, steps: &'static [(&'static str, Status, Option<Reason>)]) -> Self {
        self.check(move |result| {
            let ran: Vec<_> = result.steps.iter().map(|s| (s.name.as_str(), s.status, s.reason)).collect();
            same("steps", &ran.as_slice(), &steps)
        })
    }

    /// Whatever else must hold.
    pub(crate) fn check(
        mut self,
        check: impl Fn(&JobResult) -> Result<(), String> + Send + Sync + 'static,
    ) -> Self {
        self.last().checks.push(Box::new(check));
        self
    }

    /// What must be true of the host afterwards.
    pub(crate) fn on_host(mut self, check: impl Fn() -> Result<(), String> + Send + Sync + 'static) -> Self {
        self.on_host.push(Box::new(check));
        self
    }
}

impl Job {
    /// Everything that is wrong with a result.
    pub(crate) fn faults(&self, result: &JobResult) -> Vec<String> {
        let mut faults: Vec<String> = self.checks.iter().filter_map(|check| check(result).err()).collect();
        let verdict = (result.status, result.reason);
        faults.extend(same("(status, reason)", &verdict, &(self.status, self.reason)).err());
        let (end, wanted) = ((result.exit_code, &result.signal), (self.exit_code, &self.signal));
        if !self.any_end {
            faults.extend(same("(exit_code, signal)", &end, &wanted).err());
        }
        match (&result.limit, &self.limit) {
            (None, None) => {}
            (Some(found), Some((name, allowed, measured))) => {
                faults.extend(same("limit", &(found.name.as_str(), found.allowed), &(*name, *allowed)).err());
                faults.extend(within("limit.measured", found.measured, measured).err());
            }
            (found, wanted) => faults.push(format!("limit is {found:?}, not {wanted:?}")),
        }
        faults.extend(self.contract(result));
        faults
    }

    /// What the contract says of every result.
    fn contract(&self, result: &JobResult) -> Vec<String> {
        let mut faults = Vec::new();
        let mut must = |holds: bool, what: &str| {
            if !holds {
                faults.push(what.to_owned());
            }
        };
        if let Some(id) = self.spec["id"].as_str() {
            must(result.id.to_string() == id, "the id is another");
        }
        must(result.reason.map_or(Status::Succeeded, Reason::status) == result.status, "reason and status");
        must(
            result.message.is_empty() == result.reason.is_none(),
            "a message, and only where there is a reason",
        );
        let ran = result.exit_code.is_some() || result.signal.is_some();
        must(!(result.exit_code.is_some() && result.signal.is_some()), "exit_code or signal, not both");
        must(!ran || !result.steps.is_empty(), "a program that ran is a step");
        if let (Some(_), [step]) = (self.spec.get("command"), result.steps.as_slice()) {
            must(step.name == "main", "a plain command is called main");
            let of = |r: Option<Reason>, c: Option<i32>, s: &Option<String>| (r, c, s.clone());
            must(
                of(step.reason, step.exit_code, &step.signal)
                    == of(result.reason, result.exit_code, &result.signal)
                    || !ran,
                "the only step's verdict is the job's",
            );
        }
        for captured in [&result.stdout, &result.stderr] {
            must(captured.truncated == (captured.bytes > captured.data.len() as u64), "truncated");
        }
        let usage = &result.usage;
        must(
            usage.oom_kills == 0 || result.reason == Some(Reason::Memory),
            "killed for memory, reason memory",
        );
        must(result.timeline.run_us / 1000 >= usage.wall_time_ms, "run_us is not below wall_time_ms");
        must(!ran || usage.pids_peak > 0, "a program that ran was a process");
        faults
    }
}

/// The whole text of what was kept.
pub(crate) fn text(captured: &Captured) -> String {
    String::from_utf8_lossy(&captured.data).into_owned()
}

pub(crate) fn holds(condition: bool, otherwise: impl FnOnce() -> String) -> Result<(), String> {
    if condition { Ok(()) } else { Err(otherwise()) }
}

pub(crate) fn same<T: PartialEq + std::fmt::Debug>(what: &str, found: &T, wanted: &T) -> Result<(), String> {
    holds(found == wanted, || format!("{what} is {found:?}, not {wanted:?}"))
}

pub(crate) fn within(what: &str, value: u64, bounds: &RangeInclusive<u64>) -> Result<(), String> {
    holds(bounds.contains(&value), || format!("{what} is {value}, not in {bounds:?}"))
}
