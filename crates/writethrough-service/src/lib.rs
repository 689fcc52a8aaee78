//! The items service: an HTTP API in front of a database, with the write-through cache of
//! [`writethrough`] between them.
//!
//! [`server::Server::start`] takes a [`config::Config`] and gives a running server; `writethrough serve` does
//! little else. From the outside in: [`middleware`] is the layer around every
//! request, [`routes`] turns requests into calls of [`items`], which puts the cache in front of a
//! [`store`]. The domain's types are in [`item`], the JSON in `wire`, errors in [`problem`].
//! [`listen`] is where it listens.

#![forbid(unsafe_code)]

pub mod app;
mod authority;
pub mod causes;
mod clearing;
pub mod config;
pub mod connections;
pub mod descriptors;
mod diagnosis;
pub mod engine;
pub mod exposition;
pub mod item;
pub mod items;
mod json;
pub mod listen;
pub mod manager;
pub mod metrics;
pub mod middleware;
pub mod openapi;
pub mod problem;
mod route;
pub mod routes;
pub mod server;
pub mod shutdown;
pub mod store;
pub mod telemetry;
mod throttle;
pub mod tls;
pub mod validation;
mod wire;
