//! Checks of a [`JobSpec`] for what its types cannot say. All that is wrong is reported at once.

use std::collections::{BTreeMap, HashSet};

use globset::{GlobBuilder, GlobSetBuilder};

use crate::limits::LimitsSpec;
use crate::{
    Content, JobPath, JobSpec, LayerRef, MAX_SPEC_BYTES, Problem, SpecError, StepSpec, VolumeSource,
};

/// How many problems are told one by one.
const MAX_PROBLEMS: usize = 256;
/// The most layers of a job, as written and after expansion.
pub const MAX_LAYERS: usize = 64;
const MAX_ARGS: usize = 4096;
const MAX_ARG_BYTES: usize = 128 * 1024 - 1;
const MAX_COMMAND_BYTES: usize = 1 << 20;
const MAX_ENV: usize = 1024;
const MAX_FILES: usize = 1024;
const MAX_VOLUMES: usize = 32;
const MAX_STEPS: usize = 32;
const MAX_LABELS: usize = 32;
const MAX_GLOBS: usize = 256;
const MAX_GLOB_BYTES: usize = 1024;
/// The most `{a,b}` of one glob: each multiplies what a worker has to match.
const MAX_GLOB_ALTERNATIONS: usize = 64;
const MAX_TIME_MS: u64 = 30 * 24 * 3_600_000;
const MAX_BYTES: u64 = 1 << 50;

/// Places that hutch itself provides in every sandbox, and that a job cannot cover.
const RESERVED: [&str; 2] = ["/proc", "/dev"];

impl JobSpec {
    /// Checks what the types cannot say.
    ///
    /// # Errors
    /// The problems that were found: the first 256, and how many more there are.
    pub fn validate(&self) -> Result<(), SpecError> {
        let mut found = Found::default();
        check_layers(&self.layers, &mut found);
        check_programs(self, &mut found);
        check_env("env", &self.env, &mut found);
        check_limits("limits", &self.limits, &mut found);
        check_files(self, &mut found);
        check_volumes(self, &mut found);
        check_delivery(self, &mut found);
        check_globs(&self.outputs.paths, &mut found);
        let problems = found.into_problems();
        if problems.is_empty() { Ok(()) } else { Err(SpecError::Invalid(problems)) }
    }
}

/// What was found wrong: as much as helps, so that a spec of 100,000 faults is no answer of 100,000 sentences.
#[derive(Debug, Default)]
struct Found {
    problems: Vec<Problem>,
    more: usize,
}

impl Found {
    fn push(&mut self, problem: Problem) {
        if self.problems.len() < MAX_PROBLEMS {
            self.problems.push(problem);
        } else {
            self.more += 1;
        }
    }

    fn count(&self) -> usize {
        self.problems.len() + self.more
    }

    fn into_problems(mut self) -> Vec<Problem> {
        if self.more > 0 {
            self.problems.push(Problem::new("", format!("{} more problems", self.more)));
        }
        self.problems
    }
}

fn too_many(path: &str, count: usize, most: usize) -> Problem {
    Problem::new(path, format!("at most {most} are allowed, these are {count}"))
}

fn check_layers(layers: &[LayerRef], found: &mut Found) {
    if layers.is_empty() {
        found.push(Problem::new(
            "layers",
            "at least one layer is needed, such as \"host\" or \"image:docker.io/library/python:3.12\"",
        ));
    }
    if layers.len() > MAX_LAYERS {
        found.push(too_many("layers", layers.len(), MAX_LAYERS));
    }
    for (index, layer) in layers.iter().enumerate().skip(1) {
        if *layer == LayerRef::Host {
            found.push(Problem::new(
                format!("layers[{index}]"),
                "`host` can only be the bottom layer, the first of the list",
            ));
        }
    }
}

fn check_programs(spec: &JobSpec, found: &mut Found) {
    if let Some(command) = &spec.command {
        check_command("command", command, found);
        if !spec.steps.is_empty() {
            found.push(Problem::new("steps", "either `command` or `steps` may be given, not both"));
        }
    }
    if spec.steps.len() > MAX_STEPS {
        found.push(too_many("steps", spec.steps.len(), MAX_STEPS));
    }
    let mut names = HashSet::new();
    for (index, step) in spec.steps.iter().take(MAX_STEPS).enumerate() {
        check_step(&format!("steps[{index}]"), step, found);
        if !names.insert(step.name.as_str()) {
            found.push(Problem::new(
                format!("steps[{index}].name"),
                format!("`{}` names another step already", step.name),
            ));
        }
    }
}

fn check_step(path: &str, step: &StepSpec, found: &mut Found) {
    if !is_name(&step.name) {
        found.push(Problem::new(format!("{path}.name"), NAME_RULE));
    }
    check_command(&format!("{path}.command"), &step.command, found);
    check_env(&format!("{path}.env"), &step.env, found);
    check_limits(&format!("{path}.limits"), &step.limits, found);
}

fn check_command(path: &str, command: &[String], found: &mut Found) {
    match command.first() {
        None => found.push(Problem::new(path, "a program is needed, such as [\"python3\", \"main.py\"]")),
        Some(program) if program.is_empty() => {
            found.push(Problem::new(format!("{path}[0]"), "the program's name is empty"))
        }
        Some(_) => {}
    }
    if command.len() > MAX_ARGS {
        found.push(too_many(path, command.len(), MAX_ARGS));
    }
    for (index, argument) in command.iter().enumerate() {
        if argument.contains('\0') {
            found.push(Problem::new(format!("{path}[{index}]"), "an argument may not contain a NUL byte"));
        }
        if argument.len() > MAX_ARG_BYTES {
            found.push(Problem::new(
                format!("{path}[{index}]"),
                format!("an argument may have {MAX_ARG_BYTES} bytes, this one has {}", argument.len()),
            ));
        }
    }
    let total: usize = command.iter().map(|argument| argument.len() + 1).sum();
    if total > MAX_COMMAND_BYTES {
        found.push(Problem::new(
            path,
            format!("program and arguments may have {MAX_COMMAND_BYTES} bytes together, these have {total}"),
        ));
    }
}

fn check_env(path: &str, env: &BTreeMap<String, String>, found: &mut Found) {
    if env.len() > MAX_ENV {
        found.push(too_many(path, env.len(), MAX_ENV));
    }
    for (name, value) in env {
        if name.is_empty() || name.contains(['=', '\0']) || name.len() > 255 {
            let shown: String = name.chars().take(40).flat_map(char::escape_default).collect();
            found.push(Problem::new(
                path,
                format!(
                    "`{shown}` is no name of a variable: 1 to 255 bytes without `=` and NUL are expected"
                ),
            ));
        } else if value.contains('\0') || value.len() > MAX_ARG_BYTES - 256 {
            found.push(Problem::new(
                format!("{path}.{name}"),
                format!("a value may have {} bytes and no NUL", MAX_ARG_BYTES - 256),
            ));
        }
    }
    let total: usize = env.iter().map(|(name, value)| name.len() + value.len() + 2).sum();
    if total > MAX_COMMAND_BYTES {
        found.push(Problem::new(
            path,
            format!("the environment may have {MAX_COMMAND_BYTES} bytes, this one has {total}"),
        ));
    }
}

fn check_limits(path: &str, limits: &LimitsSpec, found: &mut Found) {
    for (name, value) in limits.given() {
        let (least, most) = match name {
            "memory_bytes" => (1 << 20, MAX_BYTES),
            "pids" => (1, 4_000_000),
            "cpu_millis" => (10, 1_000_000),
            "open_files" => (3, 1 << 20),
            "stack_bytes" => (64 << 10, MAX_BYTES),
            "disk_bytes" => (64 << 10, MAX_BYTES),
            "disk_inodes" => (16, 1 << 40),
            "swap_bytes" | "file_size_bytes" | "core_bytes" => (0, MAX_BYTES),
            // Slower, a disk's other users would wait for what a job has under way.
            "io_read_bytes_per_s" | "io_write_bytes_per_s" => (64 << 10, MAX_BYTES),
            "io_read_ops_per_s" | "io_write_ops_per_s" => (16, 1_000_000_000),
            "io_read_bytes" | "io_write_bytes" => (0, MAX_BYTES),
            "stdout_bytes" | "stderr_bytes" => (0, 64 << 20),
            "kill_grace_ms" => (0, 600_000),
            _ => (1, MAX_TIME_MS),
        };
        if !(least..=most).contains(&value) {
            found.push(Problem::new(
                format!("{path}.{name}"),
                format!("{least}..={most} is possible, not {value}"),
            ));
        }
    }
    if let Some(cpuset) = &limits.cpuset
        && !is_cpuset(cpuset)
    {
        found.push(Problem::new(
            format!("{path}.cpuset"),
            "a list of processors is expected, such as \"0-1\" or \"0,2\"",
        ));
    }
}

/// Whether a text is a list as in cpuset(7), with ranges that run upwards.
fn is_cpuset(text: &str) -> bool {
    let number = |part: &str| {
        let digits = !part.is_empty() && part.len() <= 4 && part.bytes().all(|b| b.is_ascii_digit());
        digits.then(|| part.parse::<u32>().ok()).flatten()
    };
    text.len() <= 1024
        && text.split(',').all(|range| match range.split_once('-') {
            Some((from, to)) => matches!((number(from), number(to)), (Some(a), Some(b)) if a <= b),
            None => number(range).is_some(),
        })
}

fn check_files(spec: &JobSpec, found: &mut Found) {
    if spec.files.len() > MAX_FILES {
        found.push(too_many("files", spec.files.len(), MAX_FILES));
    }
    let mut places = HashSet::new();
    for (index, file) in spec.files.iter().enumerate() {
        let path = format!("files[{index}].path");
        check_place(&path, &file.path, found);
        if !places.insert(&file.path) {
            found.push(Problem::new(path, format!("`{}` is written by another entry already", file.path)));
        }
        if file.mode.bits() & 0o7000 != 0 {
            found.push(Problem::new(
                format!("files[{index}].mode"),
                "permission bits alone are allowed: 0000 to 0777",
            ));
        }
    }
    let inline: usize = spec
        .files
        .iter()
        .map(|file| match &file.content {
            Content::Inline(bytes) => bytes.len(),
            Content::Blob(_) => 0,
        })
        .sum();
    if inline > MAX_SPEC_BYTES {
        found.push(Problem::new(
            "files",
            format!("{MAX_SPEC_BYTES} bytes may be given in place, these are {inline}"),
        ));
    }
}

fn check_place(path: &str, place: &JobPath, found: &mut Found) {
    if place.is_root() {
        found.push(Problem::new(path, "a path below `/` is expected"));
    }
    for reserved in RESERVED {
        if place.is_within(reserved) {
            found.push(Problem::new(
                path,
                format!("`{reserved}` is the sandbox's own and cannot be written or covered"),
            ));
        }
    }
}

fn check_volumes(spec: &JobSpec, found: &mut Found) {
    if spec.volumes.len() > MAX_VOLUMES {
        found.push(too_many("volumes", spec.volumes.len(), MAX_VOLUMES));
    }
    let mut targets = HashSet::new();
    for (index, volume) in spec.volumes.iter().enumerate() {
        check_place(&format!("volumes[{index}].target"), &volume.target, found);
        if !targets.insert(&volume.target) {
            found.push(Problem::new(
                format!("volumes[{index}].target"),
                format!("`{}` is the target of another volume already", volume.target),
            ));
        }
        match &volume.source {
            VolumeSource::Named(name) if !is_name(name) => {
                found.push(Problem::new(format!("volumes[{index}].volume"), NAME_RULE));
            }
            VolumeSource::HostPath(path) if JobPath::try_from(path.clone()).is_err() => {
                found.push(Problem::new(
                    format!("volumes[{index}].host_path"),
                    "an absolute path without `..` is expected",
                ));
            }
            _ => {}
        }
    }
}

/// A worker compiles the globs as they are compiled here; what fails there would be found out after the job ran.
fn check_globs(globs: &[String], found: &mut Found) {
    if globs.len() > MAX_GLOBS {
        found.push(too_many("outputs.paths", globs.len(), MAX_GLOBS));
        return;
    }
    let before = found.count();
    let mut set = GlobSetBuilder::new();
    for (index, glob) in globs.iter().enumerate() {
        let mut wrong =
            |message: String| found.push(Problem::new(format!("outputs.paths[{index}]"), message));
        let alternations = glob.bytes().filter(|byte| *byte == b'{').count();
        if !glob.starts_with('/') || glob.contains('\0') {
            wrong("a glob over absolute paths is expected, such as /box/out/**".to_owned());
        } else if glob.len() > MAX_GLOB_BYTES {
            wrong(format!("a glob may have {MAX_GLOB_BYTES} bytes, this one has {}", glob.len()));
        } else if alternations > MAX_GLOB_ALTERNATIONS {
            wrong(format!("a glob may have {MAX_GLOB_ALTERNATIONS} `{{`, this one has {alternations}"));
        } else {
            match GlobBuilder::new(glob).literal_separator(true).build() {
                Ok(glob) => drop(set.add(glob)),
                Err(error) => {
                    wrong(format!("not a glob: {}; one such as /box/out/** is expected", error.kind()))
                }
            }
        }
    }
    if found.count() == before && set.build().is_err() {
        found.push(Problem::new(
            "outputs.paths",
            "the globs are too large to be compiled together: fewer or simpler ones are expected",
        ));
    }
}

fn check_delivery(spec: &JobSpec, found: &mut Found) {
    if !is_name(&spec.queue) {
        found.push(Problem::new("queue", NAME_RULE));
    }
    if spec.priority > 31 {
        found.push(Problem::new("priority", format!("0..=31 is possible, not {}", spec.priority)));
    }
    if !(1..=100).contains(&spec.max_attempts) {
        found.push(Problem::new("max_attempts", format!("1..=100 is possible, not {}", spec.max_attempts)));
    }
    if let Some(ms) = spec.expires_in_ms
        && ms > MAX_TIME_MS
    {
        found.push(Problem::new(
            "expires_in_ms",
            format!("at most {MAX_TIME_MS} (30 days) is possible, not {ms}"),
        ));
    }
    if spec.labels.len() > MAX_LABELS {
        found.push(too_many("labels", spec.labels.len(), MAX_LABELS));
    }
    for (name, value) in &spec.labels {
        if !is_name(name) {
            let shown: String = name.chars().take(40).flat_map(char::escape_default).collect();
            found.push(Problem::new("labels", format!("`{shown}`: {NAME_RULE}")));
        } else if value.len() > 256 || value.chars().any(char::is_control) {
            found.push(Problem::new(
                format!("labels.{name}"),
                "a value may have 256 bytes and no control characters",
            ));
        }
    }
}

const NAME_RULE: &str = "1 to 63 letters, digits, `-`, `_` and `.` are expected, the first a letter or digit";

/// Whether a text is a name of a queue, volume, step or label.
pub fn is_name(text: &str) -> bool {
    text.len() <= 63
        && text.bytes().next().is_some_and(|b| b.is_ascii_alphanumeric())
        && text.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(&b))
}
