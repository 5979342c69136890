//! A network that fails on demand: it stands between a client and a server, and can be cut.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;

/// A forwarder on a port of its own, until it is dropped.
#[derive(Debug)]
pub struct Proxy {
    address: SocketAddr,
    cuts: watch::Sender<u64>,
    shared: Arc<Shared>,
    listening: tokio::task::JoinHandle<()>,
}

#[derive(Debug, Default)]
struct Shared {
    refuses: AtomicBool,
    swallows: AtomicBool,
    connections: AtomicUsize,
}

impl Proxy {
    /// Forwards to the server of an `amqp://` URL.
    ///
    /// # Errors
    /// Where no port can be had, or the URL has no host and port.
    pub async fn before(url: &str) -> io::Result<(Self, String)> {
        let server = url.rsplit('@').next().and_then(|rest| rest.split('/').next()).unwrap_or_default();
        let target: SocketAddr = server.parse().map_err(io::Error::other)?;
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let address = listener.local_addr()?;
        let (cuts, cut) = watch::channel(0);
        let shared = Arc::new(Shared::default());
        let listening = tokio::spawn(listen(listener, target, cut, Arc::clone(&shared)));
        let proxied = url.replace(server, &address.to_string());
        Ok((Self { address, cuts, shared, listening }, proxied))
    }

    /// Ends every connection that there is now.
    pub fn cut(&self) {
        self.cuts.send_modify(|cuts| *cuts += 1);
    }

    /// Whether new connections are refused from now on.
    pub fn refuse(&self, refuses: bool) {
        self.shared.refuses.store(refuses, Ordering::Relaxed);
    }

    /// Whether everything is swallowed from now on, while connections seem to stand.
    pub fn swallow(&self, swallows: bool) {
        self.shared.swallows.store(swallows, Ordering::Relaxed);
    }

    /// How many connections stand now.
    #[must_use]
    pub fn connections(&self) -> usize {
        self.shared.connections.load(Ordering::Relaxed)
    }

    /// Where it listens.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.cut();
        self.listening.abort();
    }
}

async fn listen(listener: TcpListener, target: SocketAddr, cut: watch::Receiver<u64>, shared: Arc<Shared>) {
    while let Ok((client, _)) = listener.accept().await {
        if shared.refuses.load(Ordering::Relaxed) {
            continue;
        }
        let mut cut = cut.clone();
        cut.mark_unchanged();
        let shared = Arc::clone(&shared);
        tokio::spawn(async move {
            let Ok(server) = TcpStream::connect(target).await else { return };
            shared.connections.fetch_add(1, Ordering::Relaxed);
            let (mut from_client, mut to_client) = client.into_split();
            let (mut from_server, mut to_server) = server.into_split();
            tokio::select! {
                _ = forward(&mut from_client, &mut to_server, &shared) => {}
                _ = forward(&mut from_server, &mut to_client, &shared) => {}
                _ = cut.changed() => {}
            }
            shared.connections.fetch_sub(1, Ordering::Relaxed);
        });
    }
}

async fn forward<R, W>(from: &mut R, to: &mut W, shared: &Shared) -> io::Result<()>
where
    R: tokio::io::AsyncRead + Unpin,
    W: tokio::io::AsyncWrite + Unpin,
{
    let mut buffer = vec![0; 64 << 10];
    loop {
        let count = from.read(&mut buffer).await?;
        if count == 0 {
            return Ok(());
        }
        if !shared.swallows.load(Ordering::Relaxed) {
            to.write_all(&buffer[..count]).await?;
        }
    }
}
