//! A RabbitMQ of a test's own.
//!
//! In order: free ports are looked for, a directory takes everything the server writes, the server
//! is started with all its paths and ports set by environment, and waited for until it speaks AMQP.
//! Nothing of a RabbitMQ that runs on this machine otherwise is touched: the node has its own Erlang
//! port mapper, cookie and database.
//!
//! [`Broker::start`] is for tests that do something to the broker. [`Broker::shared`] is for all
//! others: one server for every test process of a user, which ends itself when nobody has used it for
//! a while. It takes some 6 s to start, and test runners start a process for each test.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

/// Where Debian's package has the server's own scripts, without the wrappers that change user.
const SCRIPTS: &str = "/usr/lib/rabbitmq/bin";
/// Longest wait for a server to come up, on a machine that is busy with other tests.
const PATIENCE: Duration = Duration::from_secs(600);
/// Seconds without a test after which the shared server ends.
const LINGER_S: u32 = 30;
/// Longest wait for a server to write down which quorum queues it has.
const SETTLE: Duration = Duration::from_secs(5);

/// A server of one test. It ends with this value.
#[derive(Debug)]
pub struct Broker {
    node: Node,
    child: Option<Child>,
    _directory: tempfile::TempDir,
}

/// A server that many tests use; see [`Broker::shared`].
#[derive(Debug)]
pub struct SharedBroker {
    url: String,
    _in_use: File,
}

/// How a server is started: all that a restart must keep.
#[derive(Debug, Clone)]
struct Node {
    home: PathBuf,
    name: String,
    amqp: u16,
    distribution: u16,
    epmd: u16,
}

impl Broker {
    /// Starts a server and waits until it can be used.
    ///
    /// # Panics
    /// If RabbitMQ is not installed, or does not come up.
    #[must_use]
    pub fn start() -> Self {
        let directory = tempfile::Builder::new().prefix("hutch-broker-").tempdir().unwrap_or_else(fail);
        let node = Node::new(directory.path());
        let mut broker = Self { node, child: None, _directory: directory };
        broker.restart();
        broker
    }

    /// A server for tests that do nothing to it, started if it does not run yet.
    ///
    /// # Panics
    /// As [`Broker::start`].
    pub fn shared() -> &'static SharedBroker {
        static SHARED: OnceLock<SharedBroker> = OnceLock::new();
        SHARED.get_or_init(|| SharedBroker::join().unwrap_or_else(fail))
    }

    /// Where it listens, as a URL.
    #[must_use]
    pub fn url(&self) -> String {
        self.node.url()
    }

    /// Kills the server, as a power cut would; what it has on disk stays.
    ///
    /// It waits until the server has written down its queues. RabbitMQ 3.10 notes a new quorum queue in tables that it
    /// saves some seconds later; killed before that, it comes back with the queue's log, but may never elect a leader for
    /// it, so that whoever speaks to the queue waits for ever, or count its terms from the beginning again.
    pub fn kill9(&mut self) {
        let begin = Instant::now();
        while !self.node.queues_are_saved() && begin.elapsed() < SETTLE {
            std::thread::sleep(Duration::from_millis(20));
        }
        self.kill_now();
    }

    fn kill_now(&mut self) {
        if let Some(mut child) = self.child.take() {
            kill_group(child.id());
            let _ = child.wait();
        }
    }

    /// Starts the server again with what it has on disk, and waits until it can be used.
    ///
    /// # Panics
    /// If it does not come up.
    pub fn restart(&mut self) {
        if self.child.is_some() {
            self.kill9();
        }
        self.child = Some(self.node.spawn().unwrap_or_else(fail));
        self.node.wait().unwrap_or_else(fail);
    }

    /// Runs `rabbitmqctl` with these arguments; its output.
    ///
    /// # Panics
    /// If it fails.
    pub fn ctl(&self, arguments: &[&str]) -> String {
        let mut command = self.node.command("rabbitmqctl");
        let output = command.args(arguments).output().unwrap_or_else(fail);
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        assert!(output.status.success(), "rabbitmqctl {arguments:?}: {}", text(&output.stderr));
        text(&output.stdout)
    }
}

impl Drop for Broker {
    fn drop(&mut self) {
        self.kill_now();
        self.node.stop_epmd();
    }
}

impl SharedBroker {
    /// Where it listens, as a URL.
    #[must_use]
    pub fn url(&self) -> &str {
        &self.url
    }

    fn join() -> io::Result<Self> {
        // The user's own: another user's server could not be ended.
        let user = fs::metadata("/proc/self")?.uid();
        let home = std::env::temp_dir().join(format!("hutch-test-broker-{user}"));
        fs::create_dir_all(&home)?;
        let open =
            |name: &str| OpenOptions::new().create(true).truncate(false).write(true).open(home.join(name));
        let starting = open("starting")?;
        starting.lock()?;
        let in_use = open("in-use")?;
        in_use.lock_shared()?;
        let port = fs::read_to_string(home.join("port")).ok().and_then(|port| port.parse().ok());
        let url = match port.filter(|port| speaks_amqp(*port)) {
            Some(port) => url(port),
            None => {
                let node = Node::new(&home.join("node"));
                let _ = fs::remove_dir_all(&node.home);
                let child = node.spawn()?;
                node.wait()?;
                fs::write(home.join("port"), node.amqp.to_string())?;
                reap_later(&home, &child, &node)?;
                node.url()
            }
        };
        // The lock on `starting` ends here; that on `in-use` with the process.
        Ok(Self { url, _in_use: in_use })
    }
}

/// Leaves a process behind that ends the server when nobody has held `in-use` for a while.
fn reap_later(home: &Path, server: &Child, node: &Node) -> io::Result<()> {
    let script = format!(
        "idle=0
        while [ $idle -lt {LINGER_S} ]; do
            sleep 1
            if flock -n -x in-use true; then idle=$((idle+1)); else idle=0; fi
        done
        exec 9>starting; flock -x 9
        flock -n -x in-use true || exec sh \"$0\"
        rm -f port
        kill -9 -{pid}
        for try in 1 2 3 4 5; do ERL_EPMD_PORT={epmd} epmd -kill && break; sleep 1; done
        rm -rf node",
        pid = server.id(),
        epmd = node.epmd,
    );
    fs::write(home.join("reaper.sh"), script)?;
    Command::new("setsid")
        .args(["sh", "reaper.sh"])
        .current_dir(home)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .map(drop)
}

impl Node {
    fn new(home: &Path) -> Self {
        let [amqp, distribution, epmd] = free_ports();
        let name = format!("hutch-test-{amqp}@localhost");
        Self { home: home.to_owned(), name, amqp, distribution, epmd }
    }

    fn url(&self) -> String {
        url(self.amqp)
    }

    /// A script of the server's with everything set that it might take from the machine.
    fn command(&self, script: &str) -> Command {
        let path = Path::new(SCRIPTS).join(script);
        assert!(
            path.exists(),
            "RabbitMQ is not installed ({} is missing): `apt-get install --no-install-recommends rabbitmq-server`",
            path.display()
        );
        let mut command = Command::new(path);
        for (name, _) in std::env::vars().filter(|(name, _)| name.starts_with("RABBITMQ_")) {
            command.env_remove(name);
        }
        let file = |name: &str| self.home.join(name);
        command
            .env("HOME", &self.home)
            .env("ERL_EPMD_PORT", self.epmd.to_string())
            .env("ERL_EPMD_ADDRESS", "127.0.0.1")
            .env("RABBITMQ_NODENAME", &self.name)
            .env("RABBITMQ_NODE_IP_ADDRESS", "127.0.0.1")
            .env("RABBITMQ_NODE_PORT", self.amqp.to_string())
            .env("RABBITMQ_DIST_PORT", self.distribution.to_string())
            .env("RABBITMQ_MNESIA_BASE", file("mnesia"))
            .env("RABBITMQ_LOG_BASE", file("log"))
            .env("RABBITMQ_PID_FILE", file("pid"))
            .env("RABBITMQ_ENABLED_PLUGINS_FILE", file("plugins"))
            .env("RABBITMQ_CONFIG_FILE", file("rabbitmq.conf"))
            .env("RABBITMQ_CONF_ENV_FILE", "/dev/null")
            .env(
                "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS",
                // Without busy waiting, so that several fit on a small machine.
                "-kernel inet_dist_use_interface {127,0,0,1} +sbwt none +sbwtdcpu none +sbwtdio none",
            )
            .stdin(Stdio::null());
        command
    }

    fn spawn(&self) -> io::Result<Child> {
        fs::create_dir_all(&self.home)?;
        let cookie = self.home.join(".erlang.cookie");
        if !cookie.exists() {
            fs::write(&cookie, "hutch-tests")?;
            fs::set_permissions(&cookie, fs::Permissions::from_mode(0o400))?;
        }
        fs::write(self.home.join("plugins"), "[].\n")?;
        fs::write(self.home.join("rabbitmq.conf"), "disk_free_limit.absolute = 50MB\n")?;
        let output = File::create(self.home.join("output"))?;
        self.command("rabbitmq-server").stdout(output.try_clone()?).stderr(output).process_group(0).spawn()
    }

    /// Whether both tables of quorum queues were saved after the youngest queue was made: their names, of which the first
    /// part is written at once and the rest a second later, and their terms, three seconds later.
    fn queues_are_saved(&self) -> bool {
        const LATER: Duration = Duration::from_millis(300);
        let quorum = self.home.join("mnesia").join(&self.name).join("quorum").join(&self.name);
        let made = |path: &Path| fs::metadata(path).and_then(|meta| meta.modified()).ok();
        let entries = fs::read_dir(&quorum).into_iter().flatten().flatten();
        let queues = entries.map(|entry| entry.path()).filter(|path| path.is_dir());
        let youngest = queues.filter_map(|queue| made(&queue.join("config"))).max();
        let saved = |table: &str| youngest.map(|youngest| youngest + LATER) <= made(&quorum.join(table));
        saved("names.dets") && saved("meta.dets")
    }

    fn wait(&self) -> io::Result<()> {
        let begin = Instant::now();
        while begin.elapsed() < PATIENCE {
            if speaks_amqp(self.amqp) {
                return Ok(());
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        let said = fs::read_to_string(self.home.join("output")).unwrap_or_default();
        Err(io::Error::other(format!("RabbitMQ did not come up in {PATIENCE:?}: {said}")))
    }

    fn stop_epmd(&self) {
        let mut epmd = Command::new("epmd");
        epmd.arg("-kill").env("ERL_EPMD_PORT", self.epmd.to_string());
        // It refuses until it has seen that the node is gone.
        for _ in 0..40 {
            if !listens(self.epmd) {
                return;
            }
            // Looked at above, whatever it says.
            let _ = epmd.stdout(Stdio::null()).stderr(Stdio::null()).status();
            std::thread::sleep(Duration::from_millis(50));
        }
    }
}

fn url(port: u16) -> String {
    format!("amqp://guest:guest@127.0.0.1:{port}/%2f")
}

fn fail<T>(error: io::Error) -> T {
    panic!("the test's broker: {error}")
}

fn free_ports() -> [u16; 3] {
    let listeners = [(); 3].map(|()| TcpListener::bind("127.0.0.1:0").unwrap_or_else(fail));
    listeners.map(|listener| listener.local_addr().map(|address| address.port()).unwrap_or_else(fail))
}

fn listens(port: u16) -> bool {
    TcpStream::connect_timeout(&([127, 0, 0, 1], port).into(), Duration::from_secs(1)).is_ok()
}

/// Whether a server answers the protocol's header with a method frame: it listens before it can.
fn speaks_amqp(port: u16) -> bool {
    let hello = || -> io::Result<bool> {
        let address = ([127, 0, 0, 1], port).into();
        let mut stream = TcpStream::connect_timeout(&address, Duration::from_secs(1))?;
        stream.set_read_timeout(Some(Duration::from_secs(5)))?;
        stream.write_all(b"AMQP\0\0\x09\x01")?;
        let mut first = [0];
        stream.read_exact(&mut first)?;
        Ok(first == [1])
    };
    hello().unwrap_or(false)
}

fn kill_group(leader: u32) {
    let _ = Command::new("kill").args(["-9", "--", &format!("-{leader}")]).status();
}
