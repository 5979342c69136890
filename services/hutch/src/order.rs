//! From the flags of `hutch run` to a job.
//!
//! A spec that is named is the base; flags are laid over it. Without one, the base is the host layer.

use std::fs;
use std::io::{self, Read};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use anyhow::{Context, anyhow, bail};
use hutch_proto::{
    Content, FileSpec, JobPath, JobSpec, LayerRef, LimitsSpec, Mode, Network, Problem, SeccompProfile,
    SeccompRefused, SeccompSpec, SpecError, UserSpec, VolumeMount, VolumeSource,
};

use crate::cli::RunArgs;
use crate::term::safe_line;

/// The most that is read of a file or of stdin.
const MOST_BYTES: u64 = 256 << 20;

/// The job that these arguments describe.
pub(crate) fn job(args: &RunArgs) -> anyhow::Result<JobSpec> {
    let mut job = match &args.spec {
        Some(path) => read_spec(path)?,
        None => bare(&args.command)?,
    };
    if !args.layers.is_empty() {
        job.layers = args
            .layers
            .iter()
            .map(|layer| layer.parse::<LayerRef>().map_err(|error| anyhow!("--layer: {error}")))
            .collect::<Result<_, _>>()?;
    }
    job.env.extend(variables(&args.env)?);
    if let Some(cwd) = &args.cwd {
        job.cwd = Some(job_path("--cwd", cwd)?);
    }
    if let Some(user) = &args.user {
        job.user = UserSpec::try_from(user.clone()).map_err(|error| anyhow!("--user: {error}"))?;
    }
    if let Some(network) = &args.network {
        job.network = match network.as_str() {
            "none" => Network::None,
            "egress" => Network::Egress,
            other => bail!("--network: `none` or `egress` is expected, not `{other}`"),
        };
    }
    job.seccomp = seccomp(args)?.over(job.seccomp);
    for file in &args.files {
        job.files.push(file_of(file)?);
    }
    for volume in &args.volumes {
        job.volumes.push(volume_of(volume)?);
    }
    if let Some(path) = &args.stdin {
        job.stdin = Some(Content::Inline(read_all(path)?));
    }
    job.outputs.paths.extend(args.outputs.iter().cloned());
    if args.output_dir.is_some() && job.outputs.paths.is_empty() {
        bail!(
            "--output-dir: nothing is kept that could be unpacked: name it with --output, such as \
             --output '/box/out/**', or in outputs.paths of the spec"
        );
    }
    job.tty |= args.tty;
    job.limits = limits(args).over(&job.limits);
    job.validate().map_err(problems)?;
    Ok(job)
}

/// A job that was written as JSON.
pub(crate) fn read_spec(path: &Path) -> anyhow::Result<JobSpec> {
    let json = read_all(path)?;
    JobSpec::parse(&json).map_err(problems).with_context(|| format!("{} is not a job", shown(path)))
}

/// Every problem of a spec, one a line.
pub(crate) fn problems(error: SpecError) -> anyhow::Error {
    match error {
        SpecError::Invalid(problems) if problems.len() > 1 => {
            let line = |problem: &Problem| format!("\n  {}", safe_line(&problem.to_string()));
            let lines: Vec<String> = problems.iter().map(line).collect();
            anyhow!("{} problems:{}", lines.len(), lines.concat())
        }
        error => anyhow!("{}", safe_line(&error.to_string())),
    }
}

/// The whole of a file, or of stdin for `-`.
pub(crate) fn read_all(path: &Path) -> anyhow::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    let read = if path == Path::new("-") {
        io::stdin().lock().take(MOST_BYTES + 1).read_to_end(&mut bytes)
    } else {
        fs::File::open(path).and_then(|file| file.take(MOST_BYTES + 1).read_to_end(&mut bytes))
    };
    read.with_context(|| format!("{} cannot be read", shown(path)))?;
    if bytes.len() as u64 > MOST_BYTES {
        bail!("{} has more than {MOST_BYTES} bytes: bind it with --volume", shown(path));
    }
    Ok(bytes)
}

pub(crate) fn shown(path: &Path) -> String {
    if path == Path::new("-") { "stdin".to_owned() } else { path.display().to_string() }
}

/// A job with a command and nothing else said.
fn bare(command: &[String]) -> anyhow::Result<JobSpec> {
    let json = serde_json::json!({"layers": ["host"], "command": command});
    JobSpec::parse(json.to_string().as_bytes()).map_err(problems)
}

fn job_path(flag: &str, text: &str) -> anyhow::Result<JobPath> {
    JobPath::try_from(text.to_owned()).map_err(|error| anyhow!("{flag} `{text}`: {error}"))
}

/// `HOST:PATH`; a file that can be executed stays so.
fn file_of(text: &str) -> anyhow::Result<FileSpec> {
    let (host, path) = text
        .rsplit_once(':')
        .filter(|(host, _)| !host.is_empty())
        .with_context(|| format!("--file `{text}`: HOST:PATH is expected, such as main.py:/box/main.py"))?;
    let host = Path::new(host);
    let executable = fs::metadata(host).is_ok_and(|meta| meta.permissions().mode() & 0o111 != 0);
    Ok(FileSpec {
        path: job_path("--file", path)?,
        content: Content::Inline(read_all(host)?),
        mode: Mode::from_bits(if executable { 0o755 } else { 0o644 }),
    })
}

/// `SRC:TARGET[:ro|rw]`: a path of this host if it has a slash, else a volume's name.
fn volume_of(text: &str) -> anyhow::Result<VolumeMount> {
    let wrong = || {
        format!(
            "--volume `{text}`: SRC:TARGET[:ro|rw] is expected, such as pip-cache:/cache or ./data:/data:ro"
        )
    };
    let (rest, access) = match text.rsplit_once(':') {
        Some((rest, "ro")) => (rest, Some(true)),
        Some((rest, "rw")) => (rest, Some(false)),
        _ => (text, None),
    };
    if let (None, Some((before, last))) = (access, text.rsplit_once(':'))
        && before.contains(":/")
        && !last.starts_with('/')
    {
        bail!("--volume `{text}`: `ro` or `rw` is expected at the end, not `{last}`");
    }
    let (source, target) =
        rest.rsplit_once(':').filter(|(source, _)| !source.is_empty()).with_context(wrong)?;
    let is_path = source.contains('/') || source == "." || source == "..";
    let source = if is_path {
        let path = fs::canonicalize(source).with_context(|| format!("--volume: {source} cannot be used"))?;
        let path = path.into_os_string().into_string();
        VolumeSource::HostPath(path.map_err(|_| anyhow!("--volume: the path {source} is not UTF-8"))?)
    } else {
        VolumeSource::Named(source.to_owned())
    };
    let read_only = access.unwrap_or(is_path);
    Ok(VolumeMount { source, target: job_path("--volume", target)?, read_only })
}

fn seccomp(args: &RunArgs) -> anyhow::Result<SeccompSpec> {
    let profile = match args.seccomp.as_deref() {
        None => None,
        Some("default") => Some(SeccompProfile::Default),
        Some("strict") => Some(SeccompProfile::Strict),
        Some(other) => bail!("--seccomp: `default` or `strict` is expected, not `{other}`"),
    };
    let refused = match args.refused.as_deref() {
        None => None,
        Some("errno") => Some(SeccompRefused::Errno),
        Some("report") => Some(SeccompRefused::Report),
        Some("kill") => Some(SeccompRefused::Kill),
        Some(other) => bail!("--refused: `errno`, `report` or `kill` is expected, not `{other}`"),
    };
    Ok(SeccompSpec { profile, refused })
}

fn limits(args: &RunArgs) -> LimitsSpec {
    LimitsSpec {
        wall_time_ms: args.time.map(|time| time.0),
        cpu_time_ms: args.cpu_time.map(|time| time.0),
        idle_time_ms: args.idle_time.map(|time| time.0),
        memory_bytes: args.memory.map(|size| size.0),
        pids: args.pids,
        cpu_millis: args.cpu_millis,
        disk_bytes: args.disk.map(|size| size.0),
        stdout_bytes: args.max_output.map(|size| size.0),
        stderr_bytes: args.max_output.map(|size| size.0),
        ..LimitsSpec::default()
    }
}

/// The variables of `--env`.
pub(crate) fn variables(pairs: &[String]) -> anyhow::Result<Vec<(String, String)>> {
    let parsed = pairs.iter().map(|pair| {
        let (name, value) =
            pair.split_once('=').with_context(|| format!("--env `{pair}`: K=V is expected"))?;
        Ok((name.to_owned(), value.to_owned()))
    });
    parsed.collect()
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;
    use crate::cli::{Cli, Command};

    fn job_of(arguments: &[&str]) -> anyhow::Result<JobSpec> {
        let Command::Run(args) = Cli::parse_from([&["hutch", "run"], arguments].concat()).command else {
            panic!("not run");
        };
        job(&args)
    }

    #[test]
    fn flags_become_a_job() {
        let directory = tempfile::tempdir().expect("directory");
        let script = directory.path().join("a.sh");
        fs::write(&script, "true").expect("write");
        fs::set_permissions(&script, fs::Permissions::from_mode(0o755)).expect("chmod");
        let file = format!("{}:/box/a.sh", script.display());
        let volume = format!("{}:/data", directory.path().display());
        let job = job_of(&[
            "-e",
            "A=b=c",
            "-m",
            "64MiB",
            "--time",
            "2s",
            "--cpu-time",
            "500ms",
            "--file",
            &file,
            "-v",
            "cache:/c",
            "-v",
            &volume,
            "--stdin",
            script.to_str().expect("utf-8"),
            "-o",
            "/out/**",
            "--output-dir",
            "o",
            "--max-output",
            "2MiB",
            "--",
            "sh",
            "-c",
            "x",
        ])
        .expect("job");
        assert_eq!(job.layers, [LayerRef::Host]);
        assert_eq!(job.env["A"], "b=c");
        assert_eq!(job.command.as_deref(), Some(&["sh".to_owned(), "-c".to_owned(), "x".to_owned()][..]));
        assert_eq!(job.limits.memory_bytes, Some(64 << 20));
        assert_eq!((job.limits.wall_time_ms, job.limits.cpu_time_ms), (Some(2000), Some(500)));
        assert_eq!((job.limits.stdout_bytes, job.limits.stderr_bytes), (Some(2 << 20), Some(2 << 20)));
        assert_eq!(job.files[0].mode.bits(), 0o755);
        assert_eq!(job.stdin, Some(Content::inline("true")));
        assert_eq!(job.volumes[0].source, VolumeSource::Named("cache".to_owned()));
        assert!(!job.volumes[0].read_only && job.volumes[1].read_only);
    }

    #[test]
    fn flags_are_laid_over_a_spec() {
        let spec = tempfile::NamedTempFile::new().expect("file");
        fs::write(
            spec.path(),
            r#"{"layers": ["host"], "command": ["a"], "env": {"A": "1"}, "limits": {"pids": 3, "memory_bytes": 9000000}}"#,
        )
        .expect("write");
        let job = job_of(&["-m", "64MiB", "-e", "B=2", spec.path().to_str().expect("utf-8")]).expect("job");
        assert_eq!((job.limits.pids, job.limits.memory_bytes), (Some(3), Some(64 << 20)));
        assert_eq!(job.env.len(), 2);
    }

    #[test]
    fn wrong_flags_are_told_what_would_be_right() {
        for (arguments, word) in [
            (&["-e", "A", "--", "x"][..], "K=V"),
            (&["--file", "x", "--", "x"], "HOST:PATH"),
            (&["--file", "/nowhere/x:/a", "--", "x"], "/nowhere/x"),
            (&["-v", "x", "--", "x"], "SRC:TARGET"),
            (&["-v", "/nowhere/x:/a", "--", "x"], "/nowhere/x"),
            (&["-v", "a:b", "--", "x"], "absolute"),
            (&["-v", "/tmp:/c:xx", "--", "x"], "`ro` or `rw` is expected at the end, not `xx`"),
            (&["-v", "a:/c:", "--", "x"], "`ro` or `rw` is expected"),
            (&["--output-dir", "o", "--", "x"], "--output '/box/out/**'"),
            (&["--layer", "python", "--", "x"], "image:<reference>"),
            (&["--network", "host", "--", "x"], "egress"),
            (&["--seccomp", "none", "--", "x"], "strict"),
            (&["--refused", "log", "--", "x"], "report"),
            (&["--cwd", "box", "--", "x"], "absolute"),
            (&["--user", "a b", "--", "x"], "letters"),
            (&["--memory", "1", "--", "x"], "limits.memory_bytes"),
            (&["/nowhere/job.json"], "/nowhere/job.json"),
        ] {
            let error = format!("{:#}", job_of(arguments).expect_err("wrong"));
            assert!(error.contains(word), "{arguments:?}: {error}");
        }
    }
}
