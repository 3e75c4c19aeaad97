"""The application as docs/howto/nginx.rst wraps it for servers without an option to do so."""

from granian.utils.proxies import wrap_asgi_with_proxy_headers
from hypercorn.middleware import ProxyFixMiddleware
from testproject.asgi import application
from uvicorn.middleware.proxy_headers import ProxyHeadersMiddleware

hypercorn = ProxyFixMiddleware(application, mode="legacy", trusted_hops=1)  # type: ignore[arg-type]
granian = wrap_asgi_with_proxy_headers(application, trusted_hosts="127.0.0.1")
uvicorn = ProxyHeadersMiddleware(application, trusted_hosts="127.0.0.1")  # type: ignore[arg-type]
