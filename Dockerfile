# An image for an app built on eoframework: workers, relays and all other `eo` commands run from it.
#
#   docker build -t shop .                                   # in a checkout: the example shop
#   docker run --init shop run examples.shop.app:app         # EO_DATABASE_URL, EO_KAFKA_BOOTSTRAP_SERVERS with -e
#   docker run --init shop relay examples.shop.app:app
#
# For your own app copy this file beside your pyproject.toml, which names eoframework among its dependencies:
#
#   docker build --build-arg APP=src/stock -t stock .
ARG PYTHON=3.13

FROM python:${PYTHON}-slim AS build
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN python -m venv /opt/app
WORKDIR /src
COPY . .
RUN /opt/app/bin/python -m pip install . \
 && { test -x /opt/app/bin/eo || { echo "This project does not depend on eoframework: there is no eo." >&2; exit 1; }; }

FROM python:${PYTHON}-slim
# Nothing here needs root: not even a break-in through a handler gets it.
RUN useradd --uid 10001 --create-home eo
COPY --from=build /opt/app /opt/app
# The code that `eo run module:attribute` imports from the current directory, where it is not part of the package.
ARG APP=examples
WORKDIR /app
COPY ${APP} ./${APP}
USER 10001
ENV PATH=/opt/app/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 EO_LOG_FORMAT=json
# The exec form: SIGTERM reaches `eo` itself, which drains: it finishes what is in flight, commits, and ends with 0.
ENTRYPOINT ["eo"]
CMD ["--help"]
STOPSIGNAL SIGTERM
# Whether this container reaches its database, and finds the tables that its code needs. Not whether messages make
# progress: a handler that waits for its next attempt is as healthy as an idle one.
HEALTHCHECK --interval=60s --timeout=10s --start-period=30s --retries=3 CMD ["eo", "db", "check", "--no-wait"]
