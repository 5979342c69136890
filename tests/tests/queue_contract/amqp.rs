//! A client with nothing but an AMQP library.

use std::sync::{Arc, Mutex};

use futures::StreamExt as _;
use lapin::options::{
    BasicConsumeOptions, BasicPublishOptions, ConfirmSelectOptions, QueueBindOptions, QueueDeclareOptions,
};
use lapin::types::{AMQPValue, FieldTable, ShortString};
use lapin::{BasicProperties, Channel, Connection};

/// See the module.
pub(crate) struct Foreign {
    connection: Connection,
    publishes: Channel,
}

/// A message that was heard.
#[derive(Debug, Clone)]
pub(crate) struct Seen {
    pub(crate) key: String,
    pub(crate) properties: BasicProperties,
    pub(crate) body: Vec<u8>,
}

impl Seen {
    pub(crate) fn json<T: serde::de::DeserializeOwned>(&self) -> T {
        serde_json::from_slice(&self.body).unwrap()
    }
}

/// Hears what comes to a queue of its own, without taking it from anybody.
pub(crate) struct Tap {
    name: ShortString,
    seen: Arc<Mutex<Vec<Seen>>>,
}

impl Tap {
    pub(crate) fn seen(&self) -> Vec<Seen> {
        self.seen.lock().unwrap().clone()
    }

    pub(crate) fn name(&self) -> ShortString {
        self.name.clone()
    }
}

impl Foreign {
    pub(crate) async fn connect(url: &str) -> Self {
        let connection = Connection::connect(url, Default::default()).await.unwrap();
        let publishes = connection.create_channel().await.unwrap();
        publishes.confirm_select(ConfirmSelectOptions::default()).await.unwrap();
        Self { connection, publishes }
    }

    pub(crate) async fn channel(&self) -> Channel {
        self.connection.create_channel().await.unwrap()
    }

    /// Publishes, and waits until the broker has it.
    pub(crate) async fn publish(&self, exchange: &str, key: &str, body: &[u8], properties: BasicProperties) {
        let options = BasicPublishOptions::default();
        let publish =
            self.publishes.basic_publish(exchange.into(), key.into(), options, body, properties).await;
        assert!(publish.unwrap().await.unwrap().is_ack());
    }

    /// Hears what an exchange passes on by this key.
    pub(crate) async fn tap(&self, exchange: &str, key: &str) -> Tap {
        self.hear(Some((exchange, key))).await
    }

    /// A queue for replies.
    pub(crate) async fn reply_queue(&self) -> Tap {
        self.hear(None).await
    }

    async fn hear(&self, binding: Option<(&str, &str)>) -> Tap {
        let channel = self.channel().await;
        let options = QueueDeclareOptions { exclusive: true, auto_delete: true, ..Default::default() };
        let queue = channel.queue_declare("".into(), options, FieldTable::default()).await.unwrap();
        let name = queue.name().clone();
        if let Some((exchange, key)) = binding {
            let options = QueueBindOptions::default();
            channel
                .queue_bind(name.clone(), exchange.into(), key.into(), options, FieldTable::default())
                .await
                .unwrap();
        }
        let options = BasicConsumeOptions { no_ack: true, ..Default::default() };
        let mut messages =
            channel.basic_consume(name.clone(), "".into(), options, FieldTable::default()).await.unwrap();
        let seen: Arc<Mutex<Vec<Seen>>> = Arc::default();
        let heard = Arc::clone(&seen);
        tokio::spawn(async move {
            let _channel = channel;
            while let Some(Ok(message)) = messages.next().await {
                let key = message.routing_key.to_string();
                heard.lock().unwrap().push(Seen { key, properties: message.properties, body: message.data });
            }
        });
        Tap { name, seen }
    }
}

/// A header's text.
pub(crate) fn header(properties: &BasicProperties, name: &str) -> Option<String> {
    match properties.headers().as_ref()?.inner().get(name)? {
        AMQPValue::LongString(text) => Some(text.to_string()),
        other => Some(format!("{other:?}")),
    }
}
