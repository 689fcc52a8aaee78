import sys

from writethrough_items_client import Client
from writethrough_items_client.api.items import (
    create_item,
    delete_item,
    get_item,
    list_items,
    replace_item,
)
from writethrough_items_client.models import ItemFields, ItemReplacement, Problem

client = Client(base_url=sys.argv[1], raise_on_unexpected_status=True)
made = create_item.sync(client=client, body=ItemFields(name="Lamp", price=24.5))
read = get_item.sync(made.id, client=client)
assert (read.name, read.price, read.version) == ("Lamp", 24.5, 1), read
put = replace_item.sync(made.id, client=client, body=ItemReplacement(name="Desk", price=0.29))
assert (put.price, put.version) == (0.29, 2), put
page = list_items.sync(client=client, limit=5)
assert any(item.id == made.id for item in page.items), page
assert delete_item.sync(made.id, client=client).status == "deleted"
assert isinstance(get_item.sync(made.id, client=client), Problem)
print("Python: created, read, replaced, listed, deleted")
