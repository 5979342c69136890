//! Serves until it is told to end.

use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use tokio::net::TcpListener;

use crate::{Gateway, GatewayError};

/// How long answers that are under way may take at the end.
const LAST_ANSWERS: Duration = Duration::from_secs(5);

/// Serves these routes until the gateway's token is cancelled.
///
/// # Errors
/// [`GatewayError::Serve`].
pub async fn serve(listener: TcpListener, gateway: Arc<Gateway>, routes: Router) -> Result<(), GatewayError> {
    let closing = gateway.closing.clone();
    let end = closing.clone();
    let server = axum::serve(listener, routes).with_graceful_shutdown(async move { end.cancelled().await });
    tokio::select! {
        served = server.into_future() => served?,
        () = async {
            closing.cancelled().await;
            tokio::time::sleep(LAST_ANSWERS).await;
        } => tracing::warn!("some answers were cut off at the end"),
    }
    Ok(())
}
