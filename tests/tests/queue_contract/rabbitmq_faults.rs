//! RabbitMQ, and what breaks around it: connections that are cut, brokers that are killed, workers that
//! vanish, stores that fail.
