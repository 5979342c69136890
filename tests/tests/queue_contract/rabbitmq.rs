//! RabbitMQ: the contract, and what is its own.

use std::sync::Arc;

use futures::StreamExt as _;
use hutch_proto::JobId;
use hutch_queue::Queue;
use hutch_queue::rabbitmq::{RabbitConfig, RabbitQueue};
use hutch_tests::broker::Broker;
use lapin::options::{BasicConsumeOptions, QueueBindOptions, QueueDeclareOptions};
use lapin::types::{AMQPValue, FieldTable};
use object_store::memory::InMemory;
use tokio::sync::Mutex;

use crate::home::Home;

struct Rabbit {
    queue: Arc<RabbitQueue>,
    letters: DeadLetters,
    _directory: tempfile::TempDir,
}

/// Hears of every dead letter from its making on, without taking them from anybody.
struct DeadLetters {
    seen: Arc<Mutex<Vec<(JobId, String)>>>,
    _connection: lapin::Connection,
}

impl DeadLetters {
    async fn hear(url: &str) -> Self {
        let connection = lapin::Connection::connect(url, Default::default()).await.unwrap();
        let channel = connection.create_channel().await.unwrap();
        let options = QueueDeclareOptions { exclusive: true, auto_delete: true, ..Default::default() };
        let queue = channel.queue_declare("".into(), options, FieldTable::default()).await.unwrap();
        let name = queue.name().clone();
        let bind = QueueBindOptions::default();
        channel
            .queue_bind(name.clone(), "hutch.dead".into(), "#".into(), bind, FieldTable::default())
            .await
            .unwrap();
        let consume = BasicConsumeOptions { no_ack: true, ..Default::default() };
        let mut letters =
            channel.basic_consume(name, "".into(), consume, FieldTable::default()).await.unwrap();
        let seen: Arc<Mutex<Vec<_>>> = Arc::default();
        let heard = Arc::clone(&seen);
        tokio::spawn(async move {
            let _channel = channel;
            while let Some(Ok(letter)) = letters.next().await {
                let id = letter.properties.message_id().as_ref().and_then(|id| id.as_str().parse().ok());
                if let Some(id) = id {
                    heard.lock().await.push((id, header(&letter.properties, "x-hutch-reason")));
                }
            }
        });
        Self { seen, _connection: connection }
    }
}

fn header(properties: &lapin::BasicProperties, name: &str) -> String {
    match properties.headers().as_ref().and_then(|headers| headers.inner().get(name)) {
        Some(AMQPValue::LongString(text)) => text.to_string(),
        other => format!("{other:?}"),
    }
}

async fn connect(url: &str, directory: &std::path::Path, store: Arc<InMemory>) -> RabbitQueue {
    let mut config = RabbitConfig::new(url, store);
    config.index = Some(directory.join("index.db"));
    RabbitQueue::connect(config).await.unwrap()
}

impl Home for Rabbit {
    async fn start() -> Self {
        let url = Broker::shared().url();
        let directory = tempfile::tempdir().unwrap();
        let queue = connect(url, directory.path(), Arc::default()).await;
        let letters = DeadLetters::hear(url).await;
        Self { queue: Arc::new(queue), letters, _directory: directory }
    }

    fn queue(&self) -> Arc<dyn Queue> {
        self.queue.clone()
    }

    async fn dead_letters(&self) -> Vec<(JobId, String)> {
        self.letters.seen.lock().await.clone()
    }
}

crate::suite::every_scenario!(Rabbit);
