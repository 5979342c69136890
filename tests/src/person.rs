//! A person at a terminal, who works in a shell that a command of hutch has started there.

use std::process::{Command, Stdio};

use crate::house::House;

/// The script of the shell that the person expects.
pub const SHELL: &str = "PS1='> '; export PS1; echo ready; exec sh -i";

/// A person at a terminal: waits for a text, and types, resizes, or goes on.
const PROGRAM: &str = r#"
import fcntl, os, pty, select, struct, sys, termios, time
pid, fd = pty.fork()
if pid == 0:
    os.execv(sys.argv[1], sys.argv[1:])
def size(rows, columns):
    fcntl.ioctl(fd, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
seen = b""
def wait(text):
    global seen
    until = time.time() + 60
    while text not in seen:
        ready, _, _ = select.select([fd], [], [], until - time.time())
        if not ready:
            sys.exit("no %r in %r" % (text, seen))
        try:
            seen += os.read(fd, 4096)
        except OSError:
            sys.exit("ended, no %r in %r" % (text, seen))
    seen = seen[seen.index(text) + len(text):]
size(33, 101)
wait(b"ready")
raw = not (termios.tcgetattr(fd)[3] & termios.ICANON)
os.write(fd, b"stty size\r")
wait(b"33 101")
size(44, 111)
time.sleep(0.5)
os.write(fd, b"stty size\r")
wait(b"44 111")
os.write(fd, b"sleep 100\r")
time.sleep(0.5)
os.write(fd, b"\x03")
time.sleep(0.2)
os.write(fd, b"echo after $((40 + 2))\r")
wait(b"after 42")
os.write(fd, b"exit 7\r")
_, status = os.waitpid(pid, 0)
cooked = bool(termios.tcgetattr(fd)[3] & termios.ICANON)
print("raw", raw, "restored", cooked, "exit", os.waitstatus_to_exitcode(status))
"#;

/// Has the person start this command of hutch, look at and change the size of the terminal, press Ctrl-C, and leave with
/// exit code 7.
///
/// # Panics
/// If the person does not see what is expected, or the terminal is not as before.
pub fn works(house: &House, arguments: &[&str], variables: &[(&str, &str)]) {
    let done = Command::new("python3")
        .arg(house.file("person.py", PROGRAM))
        .arg(crate::hutch::binary())
        .args(arguments)
        .envs(variables.iter().copied())
        .stdin(Stdio::null())
        .output()
        .expect("python3");
    let said = String::from_utf8_lossy(&done.stdout);
    assert_eq!(said.trim(), "raw True restored True exit 7", "{}", String::from_utf8_lossy(&done.stderr));
}
