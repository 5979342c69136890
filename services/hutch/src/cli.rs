//! The command line, as clap reads it.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};
use clap_complete::Shell;
use hutch_proto::JobId;
use hutch_proto::units::{ByteSize, Millis};

/// Run programs that nobody trusts, each in a sandbox of its own.
#[derive(Debug, Parser)]
#[command(name = "hutch", version, arg_required_else_help = true, after_help = EXAMPLES)]
pub(crate) struct Cli {
    /// Read this config file [default: ./hutch.toml, then /etc/hutch/hutch.toml].
    #[arg(long, global = true, value_name = "FILE")]
    pub(crate) config: Option<PathBuf>,
    #[command(subcommand)]
    pub(crate) command: Command,
}

const EXAMPLES: &str = "\
Examples:
  hutch run -- python3 -c 'print(6 * 7)'       one program, here and now
  hutch up --demo                              everything in one process, and four jobs to look at
  hutch submit job.json --wait                 a job for a running gateway
  hutch doctor                                 what this host can do

Config: hutch.toml, then HUTCH__SECTION__KEY, then flags; `hutch config show` shows what is in force.
Logs go to stderr: HUTCH_LOG=info (or debug, or hutch_worker=debug).";

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Run one job here, without a queue; exits as its program did.
    Run(Box<RunArgs>),
    /// Run everything in one process: worker, gateway, page and metrics, on an embedded queue.
    Up(UpArgs),
    /// Take jobs from a queue and run them.
    Worker(WorkerArgs),
    /// Serve the HTTP API and the page.
    Gateway(GatewayArgs),
    /// Hand a job to a gateway.
    Submit(SubmitArgs),
    /// Show where a job is.
    Status(JobArgs),
    /// Show what a job wrote.
    Logs(LogsArgs),
    /// Call a job off.
    Cancel(JobArgs),
    /// Run one more command in a job that runs.
    Exec(ExecArgs),
    /// List the files that a job left, or fetch them.
    Outputs(OutputsArgs),
    /// The layers that are kept here.
    #[command(subcommand)]
    Layer(LayerCommand),
    /// The volumes that are kept here.
    #[command(subcommand)]
    Volume(VolumeCommand),
    /// Say what this host can do; exits 1 if a job could not be isolated.
    Doctor(DoctorArgs),
    /// Attack the sandbox that this is started in, for `doctor` and workers.
    #[command(hide = true)]
    Probe {
        /// What to try.
        words: Vec<String>,
    },
    /// Check a job's spec, or print its JSON Schema.
    #[command(subcommand)]
    Spec(SpecCommand),
    /// Look at the config.
    #[command(subcommand)]
    Config(ConfigCommand),
    /// Print the completions of a shell.
    #[command(after_help = "Example:\n  hutch completion bash > /etc/bash_completion.d/hutch")]
    Completion {
        /// Which shell.
        shell: Shell,
    },
}

#[derive(Debug, Args)]
#[command(after_help = RUN_HELP, override_usage = "hutch run [FLAGS] -- COMMAND…\n       hutch run [FLAGS] SPEC.json|-")]
pub(crate) struct RunArgs {
    /// A job's spec as JSON; `-` reads it from stdin. Flags are laid over it.
    #[arg(value_name = "SPEC", conflicts_with = "command")]
    pub(crate) spec: Option<PathBuf>,
    /// The program and its arguments; no shell.
    #[arg(last = true, value_name = "COMMAND", required_unless_present = "spec")]
    pub(crate) command: Vec<String>,
    /// A layer of its file system, base first; repeatable [default: host].
    #[arg(long = "layer", value_name = "LAYER")]
    pub(crate) layers: Vec<String>,
    /// Copy a file of this host into the sandbox; repeatable.
    #[arg(long = "file", value_name = "HOST:PATH")]
    pub(crate) files: Vec<String>,
    /// Set a variable of the environment; repeatable.
    #[arg(short, long = "env", value_name = "K=V")]
    pub(crate) env: Vec<String>,
    /// The directory it starts in; made if missing.
    #[arg(short = 'w', long, value_name = "DIR")]
    pub(crate) cwd: Option<String>,
    /// Whom it runs as: name, uid, uid:gid or name:group [default: 1001:1001].
    #[arg(short, long)]
    pub(crate) user: Option<String>,
    /// Memory of the whole process tree [default: 512MiB].
    #[arg(short, long, value_name = "SIZE")]
    pub(crate) memory: Option<ByteSize>,
    /// Processor time of the whole process tree [default: none].
    #[arg(long, value_name = "TIME", value_parser = time)]
    pub(crate) cpu_time: Option<Millis>,
    /// Time on the clock [default: 1m].
    #[arg(short, long, value_name = "TIME", value_parser = time)]
    pub(crate) time: Option<Millis>,
    /// Time without output and without use of a processor [default: none].
    #[arg(long, value_name = "TIME", value_parser = time)]
    pub(crate) idle_time: Option<Millis>,
    /// Processes and threads at one time [default: 128].
    #[arg(long, value_name = "N")]
    pub(crate) pids: Option<u64>,
    /// Thousandths of one processor [default: 1000].
    #[arg(long, value_name = "N")]
    pub(crate) cpu_millis: Option<u64>,
    /// What it may write [default: 256MiB].
    #[arg(long, value_name = "SIZE")]
    pub(crate) disk: Option<ByteSize>,
    /// What is kept of stdout, and of stderr [default: 1MiB each].
    #[arg(long, value_name = "SIZE")]
    pub(crate) max_output: Option<ByteSize>,
    /// Bind a volume (a name) or a directory of this host (a path); repeatable.
    #[arg(short, long = "volume", value_name = "SRC:TARGET[:ro|rw]")]
    pub(crate) volumes: Vec<String>,
    /// What it reads from stdin; `-` hands on this command's own [default: nothing].
    #[arg(short = 'i', long, value_name = "FILE")]
    pub(crate) stdin: Option<PathBuf>,
    /// Run it on a terminal; this command's own, if stdin is one, is handed on to it.
    #[arg(short = 'T', long)]
    pub(crate) tty: bool,
    /// Keep what it wrote at these paths, such as `/box/out/**`; repeatable.
    #[arg(short, long = "output", value_name = "GLOB")]
    pub(crate) outputs: Vec<String>,
    /// Unpack what is kept into this directory.
    #[arg(long, value_name = "DIR")]
    pub(crate) output_dir: Option<PathBuf>,
    /// What it sees of the network: none, egress [default: none].
    #[arg(long, value_name = "NETWORK")]
    pub(crate) network: Option<String>,
    /// Which system calls it may make: default, strict [default: default].
    #[arg(long, value_name = "PROFILE")]
    pub(crate) seccomp: Option<String>,
    /// What becomes of one that is refused: errno, report (in the result), kill [default: errno].
    #[arg(long, value_name = "WHAT")]
    pub(crate) refused: Option<String>,
    /// Print the result as JSON, alone on stdout; exits 0 if there is one.
    #[arg(long)]
    pub(crate) json: bool,
    /// Say nothing of the verdict.
    #[arg(short, long)]
    pub(crate) quiet: bool,
    /// Where named volumes and layers are kept.
    #[arg(long = "data", value_name = "DIR")]
    pub(crate) data_dir: Option<PathBuf>,
}

const RUN_HELP: &str = "\
Examples:
  hutch run -- python3 -c 'print(6 * 7)'
  hutch run --memory 64MiB --time 2s --file sum.py:/box/sum.py -- python3 /box/sum.py
  hutch run --volume pip-cache:/cache --output '/box/out/**' --output-dir out -- make -C /box
  hutch run --tty -- bash
  hutch run job.json

Exits as the program did: its exit code; 128+n if signal n ended it; 124 if a limit of time was hit;
159 if a refused system call did (`--refused kill`); 126 or 127 if the command cannot be run or is not there;
125 if the job could not be run.";

#[derive(Debug, Args)]
pub(crate) struct ServeArgs {
    /// Where to listen, such as 127.0.0.1:7070.
    #[arg(long, value_name = "ADDR")]
    pub(crate) listen: Option<String>,
    /// Where everything is kept [default: /var/lib/hutch as root, else $XDG_STATE_HOME/hutch].
    #[arg(long = "data", value_name = "DIR")]
    pub(crate) data_dir: Option<PathBuf>,
}

#[derive(Debug, Args)]
pub(crate) struct QueueArgs {
    /// The broker, such as amqp://user:password@host:5672; the embedded queue if left out.
    #[arg(long, value_name = "URL")]
    pub(crate) broker: Option<String>,
    /// Where blobs and results are kept, such as s3://bucket/prefix or file:///srv/hutch; all services share it.
    #[arg(long, value_name = "URL")]
    pub(crate) store: Option<String>,
}

#[derive(Debug, Args)]
pub(crate) struct SlotArgs {
    /// How many jobs run at one time [default: one for each processor].
    #[arg(long, value_name = "N")]
    pub(crate) slots: Option<u32>,
    /// Take jobs of this queue; repeatable [default: default].
    #[arg(long = "queue", value_name = "NAME")]
    pub(crate) queues: Vec<String>,
}

#[derive(Debug, Args)]
#[command(
    after_help = "Examples:\n  hutch up\n  hutch up --demo\n  hutch up --listen 127.0.0.1:8080 --data ./state --slots 4"
)]
pub(crate) struct UpArgs {
    #[command(flatten)]
    pub(crate) serve: ServeArgs,
    #[command(flatten)]
    pub(crate) slots: SlotArgs,
    /// Run four jobs that end in four ways, show their verdicts, and stay up.
    #[arg(long)]
    pub(crate) demo: bool,
}

#[derive(Debug, Args)]
#[command(
    after_help = "Example:\n  hutch worker --broker amqp://guest:guest@127.0.0.1 --store file:///srv/hutch --slots 4"
)]
pub(crate) struct WorkerArgs {
    #[command(flatten)]
    pub(crate) serve: ServeArgs,
    #[command(flatten)]
    pub(crate) queue: QueueArgs,
    #[command(flatten)]
    pub(crate) slots: SlotArgs,
}

#[derive(Debug, Args)]
#[command(
    after_help = "Example:\n  hutch gateway --broker amqp://guest:guest@127.0.0.1 --store file:///srv/hutch"
)]
pub(crate) struct GatewayArgs {
    #[command(flatten)]
    pub(crate) serve: ServeArgs,
    #[command(flatten)]
    pub(crate) queue: QueueArgs,
    /// Who may do what: lines of `scope[,scope] sha256-of-the-token name`.
    #[arg(long, value_name = "FILE")]
    pub(crate) tokens_file: Option<PathBuf>,
}

#[derive(Debug, Args)]
pub(crate) struct ClientArgs {
    /// The gateway.
    #[arg(long, env = "HUTCH_URL", default_value = "http://127.0.0.1:7070", value_name = "URL")]
    pub(crate) url: String,
    /// The token, where the gateway wants one.
    #[arg(long, env = "HUTCH_TOKEN", hide_env_values = true, value_name = "TOKEN")]
    pub(crate) token: Option<String>,
}

#[derive(Debug, Args)]
#[command(
    after_help = "Examples:\n  hutch submit job.json\n  hutch submit job.json --wait\n  echo '{\"layers\": [\"host\"], \"command\": [\"date\"]}' | hutch submit - --follow"
)]
pub(crate) struct SubmitArgs {
    /// The job's spec as JSON; `-` reads it from stdin.
    pub(crate) spec: PathBuf,
    /// Wait for the result and print it as JSON; exits 0 if the job succeeded, else 1.
    #[arg(long)]
    pub(crate) wait: bool,
    /// Show what the job writes, and exit as its program did.
    #[arg(long, conflicts_with = "wait")]
    pub(crate) follow: bool,
    #[command(flatten)]
    pub(crate) client: ClientArgs,
}

#[derive(Debug, Args)]
pub(crate) struct JobArgs {
    /// The job's id.
    pub(crate) id: JobId,
    /// Print what the gateway says, as JSON.
    #[arg(long)]
    pub(crate) json: bool,
    #[command(flatten)]
    pub(crate) client: ClientArgs,
}

#[derive(Debug, Args)]
pub(crate) struct LogsArgs {
    /// The job's id.
    pub(crate) id: JobId,
    /// Go on until the job ends.
    #[arg(short, long)]
    pub(crate) follow: bool,
    #[command(flatten)]
    pub(crate) client: ClientArgs,
}

#[derive(Debug, Args)]
#[command(after_help = "Examples:
  hutch exec 0199d0c4-7f3a-7c1e-9a55-0d8f6c1b2a34 -- ps ax
  hutch exec 0199d0c4-7f3a-7c1e-9a55-0d8f6c1b2a34 -- bash
  tar c src | hutch exec 0199d0c4-7f3a-7c1e-9a55-0d8f6c1b2a34 -- tar x -C /box

It has the job's user and every restriction of the job's, and ends with it. Exits as the program did: its exit
code; 128+n if signal n ended it; 126 or 127 if the command cannot be run or is not there; 125 if the job does
not run.")]
pub(crate) struct ExecArgs {
    /// The job's id.
    pub(crate) id: JobId,
    /// Run it on a terminal, which is this command's own if stdin is one [default: if stdin and stdout are].
    #[arg(short = 'T', long, overrides_with = "no_tty")]
    pub(crate) tty: bool,
    /// Do not run it on a terminal.
    #[arg(long)]
    pub(crate) no_tty: bool,
    /// Set a variable of the environment, beside the job's own; repeatable.
    #[arg(short, long = "env", value_name = "K=V")]
    pub(crate) env: Vec<String>,
    /// The directory it starts in; made if missing [default: that of the job's program].
    #[arg(short = 'w', long, value_name = "DIR")]
    pub(crate) cwd: Option<String>,
    /// The program and its arguments.
    #[arg(last = true, required = true, value_name = "COMMAND")]
    pub(crate) command: Vec<String>,
    #[command(flatten)]
    pub(crate) client: ClientArgs,
}

#[derive(Debug, Args)]
#[command(
    after_help = "Examples:\n  hutch outputs 0199d0c4-7f3a-7c1e-9a55-0d8f6c1b2a34\n  hutch outputs 0199d0c4-7f3a-7c1e-9a55-0d8f6c1b2a34 --extract out"
)]
pub(crate) struct OutputsArgs {
    /// The job's id.
    pub(crate) id: JobId,
    /// Unpack them into this directory.
    #[arg(long, value_name = "DIR")]
    pub(crate) extract: Option<PathBuf>,
    /// Print the list as JSON.
    #[arg(long)]
    pub(crate) json: bool,
    #[command(flatten)]
    pub(crate) client: ClientArgs,
}

#[derive(Debug, Subcommand)]
pub(crate) enum LayerCommand {
    /// Import an image or a layer: an OCI image layout, a Docker archive, or the tar of a root file system.
    #[command(after_help = IMPORT_HELP)]
    Import {
        /// The file or directory; a tar may be compressed by gzip or zstd.
        path: PathBuf,
        /// The image's name, such as my/python:3.12; the one that it brings if left out.
        #[arg(long, value_name = "NAME")]
        name: Option<String>,
        #[command(flatten)]
        store: LayerStoreArgs,
    },
    /// Fetch an OCI image from its registry, even if it is here.
    Pull {
        /// The image, such as docker.io/library/python:3.12.
        image: String,
        #[command(flatten)]
        store: LayerStoreArgs,
    },
    /// List the images and layers that are kept.
    List {
        #[command(flatten)]
        store: LayerStoreArgs,
    },
    /// Remove images by name, or layers by digest.
    Remove {
        /// Names and digests.
        #[arg(required = true, value_name = "NAME|DIGEST")]
        names: Vec<String>,
        #[command(flatten)]
        store: LayerStoreArgs,
    },
    /// Remove from this host the unpacked layers that were not used for long; what is needed again is unpacked again.
    Gc {
        /// Keep those that were used within this time.
        #[arg(long, value_name = "DURATION", default_value = "7d")]
        older_than: humantime::Duration,
        /// Go on, the longest unused first, until no more than this is left.
        #[arg(long, value_name = "SIZE")]
        max_bytes: Option<bytesize::ByteSize>,
        #[command(flatten)]
        store: LayerStoreArgs,
    },
}

const IMPORT_HELP: &str = "Examples:
  hutch layer import python.tar
  hutch layer import rootfs.tar.zst --name my/base:1
  hutch run --layer image:my/base:1 -- /bin/sh -c 'echo hello'";

/// Where layers are kept.
#[derive(Debug, Args)]
pub(crate) struct LayerStoreArgs {
    /// Where everything is kept.
    #[arg(long = "data", value_name = "DIR")]
    pub(crate) data_dir: Option<PathBuf>,
    /// Print JSON.
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Subcommand)]
pub(crate) enum VolumeCommand {
    /// List the volumes with their sizes.
    List {
        /// Where everything is kept.
        #[arg(long = "data", value_name = "DIR")]
        data_dir: Option<PathBuf>,
        /// Print the list as JSON.
        #[arg(long)]
        json: bool,
    },
    /// Remove volumes and all that is in them.
    Remove {
        /// Their names.
        #[arg(required = true)]
        names: Vec<String>,
        /// Where everything is kept.
        #[arg(long = "data", value_name = "DIR")]
        data_dir: Option<PathBuf>,
    },
}

#[derive(Debug, Args)]
pub(crate) struct DoctorArgs {
    /// Print what was found as JSON.
    #[arg(long)]
    pub(crate) json: bool,
    /// Where everything is kept.
    #[arg(long = "data", value_name = "DIR")]
    pub(crate) data_dir: Option<PathBuf>,
}

#[derive(Debug, Subcommand)]
pub(crate) enum SpecCommand {
    /// Check a spec; exits 1 and says what is wrong and where.
    Check {
        /// The spec as JSON; `-` reads it from stdin.
        file: PathBuf,
    },
    /// Print the JSON Schema of a spec.
    Schema,
}

#[derive(Debug, Subcommand)]
pub(crate) enum ConfigCommand {
    /// Print what is in force, and where each value comes from.
    Show,
}

/// A time on the command line. Who writes `-t 5` rarely means the milliseconds that a config file does.
fn time(text: &str) -> Result<Millis, String> {
    if text.trim().bytes().all(|byte| byte.is_ascii_digit()) && !text.trim().is_empty() {
        let number = text.trim();
        return Err(format!("{number} has no unit: {number}s or {number}ms is expected"));
    }
    text.parse()
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_line_is_well_formed() {
        Cli::command().debug_assert();
    }

    #[test]
    fn a_command_comes_after_two_dashes() {
        let cli = Cli::try_parse_from(["hutch", "run", "-m", "64MiB", "--", "ls", "-l"]).expect("parsed");
        let Command::Run(args) = cli.command else { panic!("run") };
        assert_eq!(args.command, ["ls", "-l"]);
        assert_eq!(args.memory, Some(ByteSize(64 << 20)));
        assert!(Cli::try_parse_from(["hutch", "run"]).is_err());
        assert!(Cli::try_parse_from(["hutch", "run", "a.json", "--", "ls"]).is_err());
        let wrong = Cli::try_parse_from(["hutch", "run", "-m", "much", "--", "ls"]).expect_err("no size");
        assert!(wrong.to_string().contains("256MiB"), "{wrong}");
    }

    #[test]
    fn a_time_needs_its_unit() {
        for flag in ["-t", "--time", "--cpu-time", "--idle-time"] {
            let wrong = Cli::try_parse_from(["hutch", "run", flag, "5", "--", "ls"]).expect_err("no unit");
            assert!(wrong.to_string().contains("5 has no unit: 5s or 5ms is expected"), "{wrong}");
            let wrong = Cli::try_parse_from(["hutch", "run", flag, "soon", "--", "ls"]).expect_err("no time");
            assert!(wrong.to_string().contains("such as 5s"), "{wrong}");
            assert!(Cli::try_parse_from(["hutch", "run", flag, "1m 30s", "--", "ls"]).is_ok());
        }
    }
}
